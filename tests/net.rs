//! Peers over real QUIC on loopback: a region of a server as a store, and as memory whose faults it answers.
//!
//! Goal: whatever is asked, by however many, cancelled or not, over whatever path: the bytes are the served store's bytes. Method: every
//! page of the served world names itself, see `common/net.rs`.

#[path = "common/net.rs"]
mod common;

use common::*;
use pageferry::{
    Extent, FaultAround, FileStore, Grant, MemoryStore, NetError, PageStore, Pager, PagerOptions, Peer, Region, Server, StoreError,
    TransportOptions, Trust, conformance, testing::Gated,
};
use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

/// 4 MiB of [`content`].
const WORLD_PAGES: u64 = 1024;

/// A server of one world, granted for reading.
fn serve(keys: &Keys, options: TransportOptions) -> Server {
    let store = world(WORLD_PAGES);
    Server::builder(&keys.server).grant(keys.client_id(), "world", store, Grant::Read).transport(options).listen(LOOPBACK).unwrap()
}

async fn conforms<S: PageStore>(make: impl Fn(u64) -> S) {
    let keys = Keys::new();
    let server = Server::builder(&keys.server).trust(Trust::ids([keys.client_id()])).listen(LOOPBACK).unwrap();
    let peer = keys.connect(server.local_addr()).await;
    let made = AtomicU64::new(0);
    conformance::run(async |size_bytes| {
        let name = made.fetch_add(1, Relaxed).to_string();
        server.grant(keys.client_id(), &name, make(size_bytes), Grant::ReadWrite);
        peer.open(&name).await.unwrap()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_of_a_peer_conforms() {
    conforms(|size_bytes| MemoryStore::zeroed(size_bytes, KIB_4)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_a_peer_conforms() {
    let directory = tempfile::tempdir().unwrap();
    let made = AtomicU64::new(0);
    let path = || directory.path().join(made.fetch_add(1, Relaxed).to_string());
    conforms(|size_bytes| FileStore::create(path(), size_bytes, KIB_4).unwrap()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_reads_at_once_each_get_their_own_pages() {
    let keys = Keys::new();
    let server = serve(&keys, TransportOptions::default());
    let store = Arc::new(keys.connect(server.local_addr()).await.open("world").await.unwrap());
    let readers = (0..400).map(|seed| {
        let store = store.clone();
        tokio::spawn(async move {
            let extent = Random(seed).extent(store.extent(), 40);
            let behind = seed % 3 == 0;
            let runs = if behind { store.read_behind(extent).await } else { store.read(extent).await };
            assert_world(extent, &runs.unwrap());
        })
    });
    for reader in readers.collect::<Vec<_>>() {
        soon("a read", reader).await.unwrap();
    }
}

/// Polls a future a random number of times, fewer than 6.
async fn poll_some<F: Future>(random: &mut Random, mut future: std::pin::Pin<&mut F>) {
    let mut polls = random.below(6);
    std::future::poll_fn(|context| {
        polls = polls.saturating_sub(1);
        let done = future.as_mut().poll(context).is_ready();
        if done || polls == 0 { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
}

/// A read is dropped after a random number of polls; those that follow on the same lanes must not get its answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn reads_after_cancelled_reads_get_their_own_pages() {
    after_abandoned_reads(true).await;
}

/// A read that is not polled any more, and not dropped either, must hold nothing that others wait for: it once held the right to open a stream, and every later
/// read of the process waited for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_read_that_nobody_polls_any_more_holds_up_no_other() {
    after_abandoned_reads(false).await;
}

async fn after_abandoned_reads(dropped: bool) {
    let keys = Keys::new();
    let server = serve(&keys, TransportOptions::default());
    let store = Arc::new(keys.connect(server.local_addr()).await.open("world").await.unwrap());
    let readers = (0..8).map(|seed| {
        let store = store.clone();
        tokio::spawn(async move {
            let mut random = Random(seed);
            for _ in 0..60 {
                let mut abandoned = Some(Box::pin(store.read(random.extent(store.extent(), 300))));
                if let Some(read) = &mut abandoned {
                    poll_some(&mut random, read.as_mut()).await;
                }
                if dropped {
                    abandoned = None;
                }
                let extent = random.extent(store.extent(), 40);
                assert_world(extent, &store.read(extent).await.unwrap());
                drop(abandoned);
            }
        })
    });
    for reader in readers.collect::<Vec<_>>() {
        soon("a reader", reader).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_datagram_size_and_window_brings_every_byte() {
    let keys = Keys::new();
    for (mtu_max_bytes, stream_window_bytes) in [(1200, 1 << 20), (1452, 128 << 20), (8900, 1 << 20), (8900, 128 << 20)] {
        let options = TransportOptions { mtu_max_bytes, stream_window_bytes, ..TransportOptions::default() };
        let server = serve(&keys, options.clone());
        let store = keys.connect_with(server.local_addr(), options).await.open("world").await.unwrap();
        assert_world(store.extent(), &pull_all(&store, vec![store.extent()]).await);
        assert_world(store.extent(), &soon("a read of all", store.read(store.extent())).await.unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_larger_than_its_window_goes_on_as_it_is_read() {
    const PAGES: u64 = 4096;
    let keys = Keys::new();
    let window = TransportOptions { stream_window_bytes: 1 << 20, send_window_bytes: 2 << 20, ..TransportOptions::default() };
    let server = Server::builder(&keys.server)
        .grant(keys.client_id(), "world", world(PAGES), Grant::Read)
        .transport(TransportOptions { compress: false, ..window.clone() })
        .listen(LOOPBACK)
        .unwrap();
    let store = keys.connect_with(server.local_addr(), window).await.open("world").await.unwrap();
    assert_world(store.extent(), &pull_all(&store, vec![store.extent()]).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_clients_at_once_get_what_each_was_granted() {
    let (keys, other) = (Keys::new(), Keys::new());
    let server = Server::builder(&keys.server)
        .grant(keys.client_id(), "world", world(WORLD_PAGES), Grant::Read)
        .grant(other.client_id(), "world", MemoryStore::from_bytes(vec![9; PAGE], KIB_4), Grant::Read)
        .listen(LOOPBACK)
        .unwrap();
    let ours = keys.connect(server.local_addr()).await.open("world").await.unwrap();
    let trust = Trust::ids([keys.server.peer_id()]);
    let theirs = Peer::builder(server.local_addr(), trust, &other.client).connect().await.unwrap().open("world").await.unwrap();
    let (ours_runs, theirs_runs) = tokio::join!(pull_all(&ours, vec![ours.extent()]), theirs.read(theirs.extent()));
    assert_world(ours.extent(), &ours_runs);
    assert_eq!(theirs_runs.unwrap(), [pageferry::Run::bytes(Extent::page(0), vec![9; PAGE].into())]);
    assert_eq!(server.connections(), 2);
}

/// Reads on demand while a pull runs are right, and the pull brings the rest: together every page, and none twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_pull_and_demand_together_bring_every_page_and_the_pull_none_twice() {
    let keys = Keys::new();
    let server = serve(&keys, TransportOptions::default());
    let store = Arc::new(keys.connect(server.local_addr()).await.open("world").await.unwrap());
    let demand = tokio::spawn({
        let store = store.clone();
        async move {
            let mut random = Random(5);
            let mut seen = BTreeSet::new();
            for _ in 0..100 {
                let extent = random.extent(store.extent(), 4);
                assert_world(extent, &store.read(extent).await.unwrap());
                seen.extend(extent.pages());
            }
            seen
        }
    });
    let mut pulled = BTreeSet::new();
    for run in pull_all(&*store, vec![store.extent()]).await {
        assert_run(&run);
        for page in run.extent.pages() {
            assert!(pulled.insert(page), "page {page} was pulled twice");
        }
    }
    let demanded = soon("the demand reads", demand).await.unwrap();
    let all: BTreeSet<u64> = pulled.union(&demanded).copied().collect();
    assert_eq!(all.len() as u64, store.extent().count());
}

/// The pull stands at its first pages, held at the gate, while the last ones are demanded.
#[tokio::test(flavor = "multi_thread")]
async fn pages_sent_on_demand_are_left_out_of_the_pull() {
    let keys = Keys::new();
    let gated = Gated::new(world(WORLD_PAGES));
    let server =
        Server::builder(&keys.server).grant(keys.client_id(), "world", gated.clone(), Grant::Read).listen(LOOPBACK).unwrap();
    let store = Arc::new(keys.connect(server.local_addr()).await.open("world").await.unwrap());
    let demanded = Extent::between(WORLD_PAGES - 5, WORLD_PAGES);
    let pulling = tokio::spawn({
        let store = store.clone();
        async move { pull_all(&*store, vec![store.extent()]).await }
    });
    soon("the pull at the gate", gated.arrived(1)).await;
    let demand = tokio::spawn({
        let store = store.clone();
        async move { store.read(demanded).await }
    });
    soon("the demand at the gate", async {
        while !gated.release_extent(demanded) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_world(demanded, &soon("the demand read", demand).await.unwrap().unwrap());
    gated.open();
    let rest = Extent::between(0, WORLD_PAGES - 5);
    assert_world(rest, &soon("the pull", pulling).await.unwrap());
}

/// More reads than there are lanes all reach the store before any is answered, and the answers come right whichever is there first.
#[tokio::test(flavor = "multi_thread")]
async fn reads_that_share_a_lane_run_side_by_side_and_are_answered_in_order() {
    const READS: u64 = 40;
    let keys = Keys::new();
    let gated = Gated::new(world(WORLD_PAGES));
    let server =
        Server::builder(&keys.server).grant(keys.client_id(), "world", gated.clone(), Grant::Read).listen(LOOPBACK).unwrap();
    let store = Arc::new(keys.connect(server.local_addr()).await.open("world").await.unwrap());
    let reads: Vec<_> = (0..READS)
        .map(|page| {
            let store = store.clone();
            tokio::spawn(async move { store.read(Extent::page(page)).await })
        })
        .collect();
    soon("the reads at the store", gated.arrived(READS as usize)).await;
    for page in (0..READS).rev() {
        assert!(gated.release_extent(Extent::page(page)), "page {page}");
    }
    for (page, read) in (0..).zip(reads) {
        assert_world(Extent::page(page), &soon("a read", read).await.unwrap().unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_through_a_grant_is_in_the_store() {
    let keys = Keys::new();
    let memory = MemoryStore::zeroed(WORLD_PAGES * PAGE as u64, KIB_4);
    let server =
        Server::builder(&keys.server).grant(keys.client_id(), "world", memory.clone(), Grant::ReadWrite).listen(LOOPBACK).unwrap();
    let store = keys.connect(server.local_addr()).await.open("world").await.unwrap();
    store.write(store.extent(), contents(store.extent())).await.unwrap();
    store.flush().await.unwrap();
    assert_world(memory.extent(), &memory.read(memory.extent()).await.unwrap());
}

/// A region on the pager's own service, as `Region` over a `Peer` is meant to be used.
async fn region_over(keys: &Keys, server: &Server, around: FaultAround) -> (Pager, Region) {
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    let trust = Trust::ids([keys.server.peer_id()]);
    let peer = Peer::builder(server.local_addr(), trust, &keys.client).service(pager.service()).connect().await.unwrap();
    let store = peer.open("world").await.unwrap();
    let region = Region::builder().name("world").store(store).pager(&pager).fault_around(around).open().unwrap();
    (pager, region)
}

/// Each of `threads` OS threads reads all pages, from its own place on; the pages must be right at each first touch.
fn touch_all(region: &Region, threads: u64) {
    let pages = region.extent().count();
    std::thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                let mut bytes = vec![0; PAGE];
                for page in (0..pages).map(|page| (page + thread * pages / threads) % pages) {
                    region.read_at(page * PAGE as u64, &mut bytes).unwrap();
                    assert!(bytes == content(page), "thread {thread} found other bytes in page {page}");
                }
            });
        }
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_of_1_8_and_64_threads_are_answered_over_quic() {
    if !userfaultfd() {
        return;
    }
    let keys = Keys::new();
    let server = serve(&keys, TransportOptions::default());
    for (threads, around) in [(1, FaultAround::default()), (8, FaultAround::OFF), (64, FaultAround::default())] {
        let (_pager, region) = region_over(&keys, &server, around).await;
        touch_all(&region, threads);
        assert_eq!(region.residency().missing(), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_region_is_pulled_while_threads_fault() {
    if !userfaultfd() {
        return;
    }
    let keys = Keys::new();
    let server = serve(&keys, TransportOptions::default());
    let (_pager, region) = region_over(&keys, &server, FaultAround::default()).await;
    let pulling = tokio::spawn({
        let region = region.clone();
        async move { region.pull().await }
    });
    touch_all(&region, 8);
    soon("the pull", pulling).await.unwrap().unwrap();
    let residency = region.residency();
    assert_eq!((residency.missing(), residency.lost), (0, 0));
}

/// A worker of the only runtime of a program faults: its peer, pager and server all have threads of their own (S2).
#[tokio::test(flavor = "current_thread")]
async fn the_only_thread_of_a_runtime_may_fault() {
    if !userfaultfd() {
        return;
    }
    let keys = Keys::new();
    let server = serve(&keys, TransportOptions::default());
    let (_pager, region) = region_over(&keys, &server, FaultAround::default()).await;
    touch_all(&region, 1);
}

mod grants {
    use super::*;

    fn code(error: &NetError) -> Option<u16> {
        if let NetError::Refused { code, .. } = error { Some(*code) } else { None }
    }

    #[tokio::test]
    async fn what_is_not_granted_looks_like_what_does_not_exist() {
        let (keys, other) = (Keys::new(), Keys::new());
        let server = Server::builder(&keys.server)
            .grant(keys.client_id(), "mine", world(1), Grant::Read)
            .grant(other.client_id(), "their", world(1), Grant::Read)
            .listen(LOOPBACK)
            .unwrap();
        let peer = keys.connect(server.local_addr()).await;
        // Names that no key's hexadecimal digits can hold, for these stand in the message too.
        let theirs = peer.open("their").await.unwrap_err();
        let nowhere = peer.open("where").await.unwrap_err();
        assert_eq!((code(&theirs), code(&nowhere)), (Some(2), Some(2)));
        assert_eq!(theirs.to_string().replace("their", "where"), nowhere.to_string());
        peer.open("mine").await.unwrap();
    }

    #[tokio::test]
    async fn a_grant_to_read_does_not_allow_to_write() {
        let keys = Keys::new();
        let memory = world(4);
        let server =
            Server::builder(&keys.server).grant(keys.client_id(), "world", memory.clone(), Grant::Read).listen(LOOPBACK).unwrap();
        let store = keys.connect(server.local_addr()).await.open("world").await.unwrap();
        let error = store.write(Extent::page(3), &[7; PAGE]).await.unwrap_err();
        assert!(matches!(error, StoreError::ReadOnly), "{error}");

        // A client that does not look at the access it was told.
        let raw = RawClient::connect(server.local_addr(), Some(&keys.client)).await.unwrap();
        let region = raw.open("world").await;
        let refused = raw.say(&[lane(0), write(region, 3, 1, RAW, &[7; PAGE])].concat()).await;
        assert_eq!(refused.iter().map(Got::code).collect::<Vec<_>>(), [Some(3)]);
        assert_world(memory.extent(), &memory.read(memory.extent()).await.unwrap());
    }

    #[tokio::test]
    async fn a_grant_at_run_time_counts_and_leaves_open_regions_as_they_are() {
        let keys = Keys::new();
        let server = Server::builder(&keys.server).trust(Trust::ids([keys.client_id()])).listen(LOOPBACK).unwrap();
        let peer = keys.connect(server.local_addr()).await;
        assert_eq!(code(&peer.open("world").await.unwrap_err()), Some(2));
        server.grant(keys.client_id(), "world", world(4), Grant::Read);
        let store = peer.open("world").await.unwrap();
        server.grant(keys.client_id(), "world", MemoryStore::zeroed(PAGE as u64, KIB_4), Grant::Read);
        assert_world(store.extent(), &store.read(store.extent()).await.unwrap());

        // Nor does opening it again on the same connection, which tells the size of what is read.
        let raw = RawClient::connect(server.local_addr(), Some(&keys.client)).await.unwrap();
        let (mut send, mut receive) = raw.stream(&[hello(1), open("world")].concat()).await;
        let [_, first] = [Got::read(&mut receive).await.unwrap(), Got::read(&mut receive).await.unwrap()];
        server.grant(keys.client_id(), "world", world(4), Grant::Read);
        send.write_all(&open("world")).await.unwrap();
        assert_eq!(Got::read(&mut receive).await.unwrap(), first);

        let newcomer = Keys { server: keys.server.clone(), ..Keys::new() };
        server.grant(newcomer.client_id(), "world", world(4), Grant::Read);
        newcomer.connect(server.local_addr()).await.open("world").await.unwrap();
    }

    /// A frame carries up to 1 MiB; pages of 1 GiB could not travel.
    #[tokio::test]
    async fn a_store_of_pages_larger_than_a_frame_is_refused_when_opened() {
        let keys = Keys::new();
        let sizes = [1 << 20, 2 << 20].map(|bytes| pageferry::PageSize::new(bytes).unwrap());
        let [fits, too_large] = sizes.map(|size| MemoryStore::from_bytes(contents(Extent::between(0, 1024)), size));
        let server = Server::builder(&keys.server)
            .grant(keys.client_id(), "fits", fits, Grant::Read)
            .grant(keys.client_id(), "too large", too_large, Grant::Read)
            .listen(LOOPBACK)
            .unwrap();
        let peer = keys.connect(server.local_addr()).await;
        let store = peer.open("fits").await.unwrap();
        let mut bytes = vec![0; 4 << 20];
        store.read_into(store.extent(), &mut bytes).await.unwrap();
        assert!(bytes == contents(Extent::between(0, 1024)));
        let error = peer.open("too large").await.unwrap_err();
        assert!(code(&error) == Some(6) && error.to_string().contains("2097152"), "{error}");
    }

    #[tokio::test]
    async fn a_revoked_peer_is_cut_off_and_not_let_in_again() {
        let keys = Keys::new();
        let server = serve(&keys, TransportOptions::default());
        let peer = keys.connect(server.local_addr()).await;
        let store = peer.open("world").await.unwrap();
        store.read(Extent::page(0)).await.unwrap();
        server.revoke(keys.client_id());
        let error = soon("the refusal", store.read(Extent::page(1))).await.unwrap_err();
        // How it learns of it depends on what was under way: from the connection's end, from a packet that finds no connection, or from the refusal of a new one.
        assert!(matches!(error, StoreError::Unreachable { .. }), "{error}");
        let error = soon("the refusal", peer.open("world")).await.unwrap_err();
        assert!(matches!(error, NetError::Rejected { .. }), "{error}");
    }

    /// An authority that signs keys, as an organisation would run one.
    fn authority() -> (String, pageferry::Identity) {
        use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
        let certificate = |der: &[u8]| pem::encode(&pem::Pem::new("CERTIFICATE", der));
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = certificate(params.self_signed(&key).unwrap().der());
        let issuer = Issuer::new(params, key);
        let key = KeyPair::generate().unwrap();
        let leaf = CertificateParams::default().signed_by(&key, &issuer).unwrap();
        let key = pem::encode(&pem::Pem::new("PRIVATE KEY", key.serialize_der()));
        (root, pageferry::Identity::from_pem(&format!("{key}{}", certificate(leaf.der()))).unwrap())
    }

    #[tokio::test]
    async fn whoever_an_authority_signed_reaches_what_is_granted_to_all() {
        let (root, signed) = authority();
        let keys = Keys { client: signed, ..Keys::new() };
        let server = Server::builder(&keys.server)
            .trust(Trust::authority(&root).unwrap())
            .grant_all("world", world(4), Grant::Read)
            .listen(LOOPBACK)
            .unwrap();
        let store = keys.connect(server.local_addr()).await.open("world").await.unwrap();
        assert_world(store.extent(), &store.read(store.extent()).await.unwrap());

        let unsigned = Keys { server: keys.server.clone(), ..Keys::new() };
        let trust = Trust::ids([keys.server.peer_id()]);
        let error = Peer::builder(server.local_addr(), trust, &unsigned.client).connect().await.unwrap_err();
        assert!(matches!(&error, NetError::Rejected { reason, .. } if reason.contains("authority")), "{error}");
    }
}
