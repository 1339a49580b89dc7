//! Links that are slow, narrow, lossy or cut, made by one end's `LinkShape` over loopback.
//!
//! Goal: a page takes as long as the link says, and whatever the link does to datagrams, the bytes are the served store's bytes. Method: lower bounds of time are exact,
//! for the link adds delay and never takes any away; upper ones are generous, for the machine may be busy.

#[path = "common/net.rs"]
mod common;

use common::*;
use pageferry::{
    Extent, FaultAround, Grant, LinkControl, LinkShape, MemoryStore, NetError, PageStore, Pager, PagerOptions, Peer, Region,
    Server, TransportOptions, Trust,
};
use std::time::{Duration, Instant};

/// 4 MiB of the world.
const WORLD_PAGES: u64 = 1024;

/// Not compressed: so many bytes of noise are as many on the link.
fn over(shape: LinkShape) -> TransportOptions {
    TransportOptions { compress: false, shape: Some(shape), ..TransportOptions::default() }
}

fn plain() -> TransportOptions {
    TransportOptions { compress: false, ..TransportOptions::default() }
}

fn serve(keys: &Keys, store: MemoryStore, options: TransportOptions) -> Server {
    Server::builder(&keys.server).grant(keys.client_id(), "world", store, Grant::Read).transport(options).listen(LOOPBACK).unwrap()
}

/// Pages of bytes that no two datagrams have in common, and that are never zero.
fn noise(pages: u64) -> Vec<u8> {
    let mut random = Random(1);
    (0..pages * PAGE as u64 / 8).flat_map(|_| (random.next() | 1).to_le_bytes()).collect()
}

/// Whichever end is told, it is the round trip that becomes longer, and by as much.
#[tokio::test(flavor = "multi_thread")]
async fn a_read_takes_a_round_trip_of_the_link_whichever_end_shapes_it() {
    let rtt = Duration::from_millis(30);
    let shape = LinkShape { rtt, ..LinkShape::default() };
    for (client, server) in [(over(shape.clone()), plain()), (plain(), over(shape))] {
        let keys = Keys::new();
        let server = serve(&keys, world(WORLD_PAGES), server);
        let peer = keys.connect_with(server.local_addr(), client).await;
        let store = peer.open("world").await.unwrap();
        for page in 3..6 {
            let start = Instant::now();
            let runs = store.read(Extent::page(page)).await.unwrap();
            let took = start.elapsed();
            assert_world(Extent::page(page), &runs);
            assert!(took >= rtt && took < rtt * 10, "{took:?}");
        }
        assert!(peer.rtt().is_some_and(|measured| measured >= rtt), "{:?}", peer.rtt());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fault_takes_a_round_trip_of_the_link() {
    if !userfaultfd() {
        return;
    }
    let (keys, rtt) = (Keys::new(), Duration::from_millis(30));
    let server = serve(&keys, world(WORLD_PAGES), plain());
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    let trust = Trust::ids([keys.server.peer_id()]);
    let shaped = over(LinkShape { rtt, ..LinkShape::default() });
    let peer = Peer::builder(server.local_addr(), trust, &keys.client).transport(shaped).service(pager.service());
    let store = peer.connect().await.unwrap().open("world").await.unwrap();
    let region = Region::builder().store(store).pager(&pager).fault_around(FaultAround::OFF).open().unwrap();
    let read = move || {
        let (mut bytes, start) = (vec![0xEE; PAGE], Instant::now());
        region.read_at(5 * PAGE as u64, &mut bytes).unwrap();
        (bytes, start.elapsed())
    };
    let (bytes, took) = soon("a fault", tokio::task::spawn_blocking(read)).await.unwrap();
    assert!(bytes == content(5) && took >= rtt && took < rtt * 10, "{took:?}");
}

/// Delays of less than a millisecond are kept too: timers of whole milliseconds would make a LAN of this path impossible.
#[tokio::test(flavor = "multi_thread")]
async fn a_round_trip_of_less_than_a_millisecond_is_not_rounded_up() {
    let (keys, rtt) = (Keys::new(), Duration::from_micros(200));
    let server = serve(&keys, world(WORLD_PAGES), plain());
    let peer = keys.connect_with(server.local_addr(), over(LinkShape { rtt, ..LinkShape::default() })).await;
    let store = peer.open("world").await.unwrap();
    let mut shortest = Duration::MAX;
    // The best of as many as it takes: a busy machine makes any one longer.
    let end = Instant::now() + HANG;
    while shortest >= rtt * 10 && Instant::now() < end {
        let start = Instant::now();
        store.read(Extent::page(3)).await.unwrap();
        shortest = shortest.min(start.elapsed());
        assert!(start.elapsed() >= rtt);
    }
    assert!(shortest < rtt * 10, "{shortest:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_over_loss_repetition_and_reordering_brings_every_byte() {
    let keys = Keys::new();
    let server = serve(&keys, world(WORLD_PAGES), plain());
    let shape: LinkShape = "rtt=25ms, jitter=5ms, loss=1%, duplicate=1%, reorder=1%, seed=7".parse().unwrap();
    let link = shape.control.clone();
    let store = keys.connect_with(server.local_addr(), over(shape)).await.open("world").await.unwrap();
    assert_world(store.extent(), &pull_all(&store, vec![store.extent()]).await);
    assert!(link.dropped() > 0 && link.passed() > 10 * link.dropped(), "{link:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_is_no_faster_than_the_rate_of_the_link() {
    const BYTES_S: u64 = 5_000_000;
    let (keys, bytes) = (Keys::new(), noise(512));
    let server = serve(&keys, MemoryStore::from_bytes(bytes.clone(), KIB_4), plain());
    let shape = LinkShape { bytes_s: Some(BYTES_S), ..LinkShape::default() };
    let store = keys.connect_with(server.local_addr(), over(shape)).await.open("world").await.unwrap();
    let start = Instant::now();
    let runs = pull_all(&store, vec![store.extent()]).await;
    let took = start.elapsed();
    let least = Duration::from_secs_f64(bytes.len() as f64 / BYTES_S as f64);
    assert!(least > Duration::from_millis(400) && took >= least, "{took:?}, expected at least {least:?}");
    let mut pulled = vec![0; bytes.len()];
    for run in &runs {
        let pageferry::Content::Bytes(content) = &run.content else { panic!("{} are not zeros", run.extent) };
        let first = run.extent.first() as usize * PAGE;
        pulled[first..first + content.len()].copy_from_slice(content);
    }
    assert!(pulled == bytes);
}

/// Nothing arrives while the link is cut; when it is mended within the idle time-out, the pull goes on with the same connection and lacks nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_pull_goes_on_after_a_cut_that_was_mended_in_time() {
    let (keys, link) = (Keys::new(), LinkControl::default());
    let server = serve(&keys, world(WORLD_PAGES), plain());
    // Slow enough that the cut falls into the pull.
    let shape =
        LinkShape { rtt: Duration::from_millis(10), bytes_s: Some(4_000_000), control: link.clone(), ..LinkShape::default() };
    let peer = keys.connect_with(server.local_addr(), over(shape)).await;
    let store = peer.open("world").await.unwrap();
    let mut pull = store.pull(vec![store.extent()]).await.unwrap();
    let mut runs = vec![soon("the first run", pull.next()).await.unwrap().unwrap()];
    link.cut();
    assert!(link.is_cut());
    let passed = link.passed();
    // The length of the cut.
    tokio::time::sleep(Duration::from_millis(500)).await;
    // One may have been on its way past the switch.
    assert!(link.passed() <= passed + 1 && link.dropped() > 0, "{link:?}, {passed} before");
    link.mend();
    while let Some(run) = soon("a run after the cut", pull.next()).await.unwrap() {
        runs.push(run);
    }
    assert_world(store.extent(), &runs);
    assert!(link.passed() > passed + 100, "the cut did not fall into the pull: {link:?}");
    assert_eq!(server.connections(), 1);
}

/// A cut that is planned from the beginning: the connection is made before it, and a read that falls into it is answered after it.
#[tokio::test(flavor = "multi_thread")]
async fn a_read_waits_for_the_end_of_a_planned_cut() {
    let keys = Keys::new();
    let server = serve(&keys, world(WORLD_PAGES), plain());
    let opened = Instant::now();
    let [from, until] = [1000, 2000].map(Duration::from_millis);
    let shape = LinkShape { cuts: vec![from..until], ..LinkShape::default() };
    let store = keys.connect_with(server.local_addr(), over(shape)).await.open("world").await.unwrap();
    // Into the cut, whose beginning counts from a little later than `opened`.
    tokio::time::sleep_until((opened + from + Duration::from_millis(500)).into()).await;
    let runs = soon("a read in a cut", store.read(Extent::page(4))).await.unwrap();
    assert_world(Extent::page(4), &runs);
    assert!(opened.elapsed() >= until);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_loses_everything_connects_nobody() {
    let keys = Keys::new();
    let server = serve(&keys, world(1), plain());
    let shape = LinkShape { loss: 1.0, ..LinkShape::default() };
    let options = TransportOptions { shape: Some(shape), ..impatient() };
    let trust = Trust::ids([keys.server.peer_id()]);
    let connecting = Peer::builder(server.local_addr(), trust, &keys.client).transport(options).connect();
    let error = soon("the refusal", connecting).await.unwrap_err();
    assert!(matches!(error, NetError::NoConnection { .. }), "{error}");
}

#[tokio::test]
async fn a_shape_that_cannot_be_is_refused_by_name() {
    let keys = Keys::new();
    let shape = LinkShape { loss: 1.5, ..LinkShape::default() };
    let error = Server::builder(&keys.server).transport(over(shape)).listen(LOOPBACK).unwrap_err();
    assert!(error.to_string().contains("shape.loss is 1.5, allowed is a share of 0 to 1"), "{error}");
}
