//! The smallest whole program: memory that lives in another process is read here, page by page, over QUIC.
use pageferry::{Grant, Identity, MemoryStore, PageSize, Peer, Region, Server};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    // The host that has the pages. Each end has a key; a key's hash is its name.
    let (host, guest) = (Identity::generate()?, Identity::generate()?);
    let pages = MemoryStore::from_bytes(vec![7; 64 << 20], PageSize::KIB_4);
    let server = Server::builder(&host).grant(guest.peer_id(), "world", pages, Grant::Read).listen("127.0.0.1:0".parse()?)?;

    // The program that uses them, usually on another host: a region that starts empty and fills as it is touched.
    let peer = Peer::connect(server.local_addr(), host.peer_id(), &guest).await?;
    let region = Region::builder().name("world").store(peer.open("world").await?).open()?;
    let mut byte = [0];
    region.read_at(12_345_678, &mut byte)?; // a fault, a request, a page
    println!("byte 12345678 is {}; {} of {} pages are here", byte[0], region.residency().resident, region.residency().pages);

    region.pull().await?; // the rest, in the background of whatever the program does
    println!("{} of {} pages are here", region.residency().resident, region.residency().pages);
    assert!(byte == [7] && region.residency().missing() == 0);
    Ok(())
}
