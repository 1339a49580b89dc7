//! What a lying or broken server may do to its clients (S3, S7): they get errors within a bound, never panic, never hang, and never take a
//! page for another.
//!
//! Method: a server with the right key whose streams follow a script, `common/net.rs`.

#[path = "common/net.rs"]
mod common;

use common::*;
use pageferry::{
    Extent, LossPolicy, NetError, PageStore, Pager, PagerOptions, Peer, Region, RemoteStore, StoreError, TransportOptions, Trust,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::sync::Notify;

const PAGES: u64 = 64;

/// Time-outs that a test can wait for, and an idle time-out that must not be what ends a wait.
fn options() -> TransportOptions {
    TransportOptions { answer_timeout: Duration::from_secs(1), ..TransportOptions::default() }
}

/// A liar whose control stream is honest and whose other streams follow `script`, and its region as a store.
async fn liar<F>(script: impl Fn(Asked) -> F + Send + Sync + 'static) -> (Liar, RemoteStore)
where
    F: Future<Output = ()> + Send + 'static,
{
    liar_with(quinn::TransportConfig::default(), script).await
}

async fn liar_with<F>(transport: quinn::TransportConfig, script: impl Fn(Asked) -> F + Send + Sync + 'static) -> (Liar, RemoteStore)
where
    F: Future<Output = ()> + Send + 'static,
{
    let keys = Keys::new();
    let script = Arc::new(script);
    let liar = Liar::start_with(&keys.server, transport, move |asked| {
        let script = script.clone();
        async move { if asked.first.kind == HELLO { asked.control(PAGES).await } else { script(asked).await } }
    });
    let store = keys.connect_with(liar.address, options()).await.open("world").await.unwrap();
    (liar, store)
}

fn is_protocol(error: &StoreError) -> bool {
    matches!(error, StoreError::Protocol(_))
}

/// What answers a READ of pages 4..8 must be exactly these, in order; anything else is an error that trying again does not cure, and the
/// next read is right.
#[tokio::test(flavor = "multi_thread")]
async fn a_lie_in_answer_to_a_read_is_an_error_and_the_next_read_is_right() {
    let asked = Extent::between(4, 8);
    let bytes = contents(Extent::between(0, 12));
    let of = |first: usize, end: usize| &bytes[first * PAGE..end * PAGE];
    let bomb = [&[0x1f, 0][..], &[0xff; 5000]].concat();
    let lies = [
        ("pages before", data(0, 4, RAW, of(0, 4))),
        ("pages behind", data(8, 4, RAW, of(8, 12))),
        ("a page too early", data(3, 4, RAW, of(3, 7))),
        ("a page too late", data(5, 3, RAW, of(5, 8))),
        ("more pages than asked for", data(4, 5, RAW, of(4, 9))),
        ("a gap", [data(4, 1, RAW, of(4, 5)), data(6, 2, RAW, of(6, 8))].concat()),
        ("a page twice", [data(4, 1, RAW, of(4, 5)), data(4, 4, RAW, of(4, 8))].concat()),
        ("fewer bytes than pages", data(4, 4, RAW, of(4, 7))),
        ("more bytes than pages", data(4, 4, RAW, of(4, 9))),
        ("pages of all there is, as zeros", data(4, u32::MAX, ZERO, &[])),
        ("an LZ4 bomb", data(4, 4, LZ4, &bomb)),
        ("LZ4 that cannot reach its pages", data(4, 4, LZ4, &[0xff; 20])),
        ("LZ4 of nonsense", data(4, 4, LZ4, &[0x0f; 300])),
        ("content for zeros", header(DATA, ZERO, 17)),
        ("an unknown encoding", header(DATA, 3, 20)),
        ("an extent past the last there can be", data(u64::MAX, 4, ZERO, &[])),
        ("DONE", frame(DONE, 0, &[])),
        ("END", frame(END, 0, &[])),
        ("WELCOME", welcome()),
        ("an unknown kind", header(0x66, 0, 0)),
        ("a length above all limits", header(DATA, RAW, u32::MAX)),
        ("a READ", read(1, 4, 4)),
    ];
    for (what, lie) in lies {
        let reads = Arc::new(AtomicUsize::new(0));
        let (_liar, store) = liar(move |mut asked| {
            let (reads, lie) = (reads.clone(), lie.clone());
            async move {
                if reads.fetch_add(1, SeqCst) == 0 {
                    assert_eq!(asked.next().await.kind, READ);
                    asked.say(&lie).await;
                    std::future::pending().await
                }
                asked.honest().await;
            }
        })
        .await;
        let error = soon(what, store.read(asked)).await.unwrap_err();
        assert!(is_protocol(&error), "{what}: {error}");
        assert_world(asked, &soon("the next read", store.read(asked)).await.unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_cut_short_counts_as_a_peer_that_is_away() {
    let whole = honest_data(Extent::between(4, 8));
    for len in [0, 5, 8, 20, 24, whole.len() - 1] {
        let whole = whole.clone();
        let (_liar, store) = liar(move |mut asked| {
            let cut = whole[..len].to_vec();
            async move {
                asked.next().await;
                asked.say(&cut).await;
                let _ = asked.send.finish();
                let _ = asked.send.stopped().await;
            }
        })
        .await;
        let error = soon("the cut answer", store.read(Extent::between(4, 8))).await.unwrap_err();
        assert!(error.is_transient() && error.to_string().contains("peer 127.0.0.1:"), "{len}: {error}");
    }
}

/// The connection is alive, and nothing comes: each call fails within the answer time-out, says so, and holds nothing up that comes later.
#[tokio::test(flavor = "multi_thread")]
async fn answers_that_never_come_are_waited_for_within_a_bound() {
    let (_liar, store) = liar(|asked| async move {
        let _silent = asked;
        std::future::pending().await
    })
    .await;
    let reads = (0..40).map(|page| {
        let store = store.clone();
        tokio::spawn(async move { store.read(Extent::page(page)).await.map(drop) })
    });
    let mut calls: Vec<_> = reads.collect();
    calls.push(tokio::spawn({
        let store = store.clone();
        async move { store.write(Extent::page(1), &[7; PAGE]).await }
    }));
    calls.push(tokio::spawn({
        let store = store.clone();
        async move { store.pull(vec![store.extent()]).await?.next().await.map(drop) }
    }));
    for call in calls {
        let error = soon("a call that is not answered", call).await.unwrap().unwrap_err();
        assert!(error.is_transient(), "{error}");
    }
}

/// Streams that the server never answers are lost to the client; when the server allows no more, a new connection has to do.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_without_streams_left_is_replaced() {
    let mut transport = quinn::TransportConfig::default();
    transport.max_concurrent_bidi_streams(3u32.into());
    let hung = Arc::new(AtomicUsize::new(0));
    let (_liar, store) = liar_with(transport, move |asked| {
        let hung = hung.clone();
        async move {
            if hung.fetch_add(1, SeqCst) < 2 {
                let _silent = asked;
                return std::future::pending().await;
            }
            asked.honest().await;
        }
    })
    .await;
    let mut errors = 0;
    while let Err(error) = soon("a read", store.read(Extent::page(9))).await {
        assert!(error.is_transient(), "{error}");
        errors += 1;
        assert!(errors <= 3, "{error}");
    }
    assert_world(Extent::page(9), &store.read(Extent::page(9)).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_that_is_not_answered_ends_within_a_bound_and_can_be_repeated() {
    let keys = Keys::new();
    let liar = Liar::start(&keys.server, |mut asked| async move {
        if asked.number == 0 {
            asked.say(&welcome()).await;
            return std::future::pending().await;
        }
        asked.control(PAGES).await;
    });
    let peer = keys.connect_with(liar.address, options()).await;
    let error = soon("OPEN", peer.open("world")).await.unwrap_err();
    assert!(matches!(&error, NetError::NoConnection { reason, .. } if reason.contains("OPEN")), "{error}");
    soon("OPEN on a new connection", peer.open("world")).await.unwrap();
}

/// A server that goes away between its handshake and OPENED is away, and no breach of the protocol: the loss policy keeps trying.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_lost_while_a_region_is_opened_again_counts_as_away() {
    let keys = Keys::new();
    let liar = Liar::start(&keys.server, |mut asked| async move {
        match (asked.number, asked.first.kind) {
            (0, HELLO) => asked.control(PAGES).await,
            (0, _) => asked.connection.close(0u32.into(), b"lost"),
            (1, _) => {
                asked.say(&welcome()).await;
                asked.next().await;
                asked.connection.close(0u32.into(), b"lost again");
            }
            (_, HELLO) => asked.control(PAGES).await,
            _ => asked.honest().await,
        }
    });
    let store = keys.connect_with(liar.address, options()).await.open("world").await.unwrap();
    for lost in ["lost", "lost again"] {
        let error = soon("a read", store.read(Extent::page(3))).await.unwrap_err();
        assert!(error.is_transient() && error.to_string().contains(lost), "{error}");
    }
    assert_world(Extent::page(3), &soon("a read", store.read(Extent::page(3))).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_region_that_comes_back_with_another_size_is_not_read() {
    let keys = Keys::new();
    let liar = Liar::start(&keys.server, |asked| async move {
        match (asked.number, asked.first.kind) {
            (0, HELLO) => asked.control(PAGES).await,
            (0, _) => asked.connection.close(0u32.into(), b"lost"),
            (_, HELLO) => asked.control(PAGES / 2).await,
            _ => panic!("nothing may be asked of a region of another size"),
        }
    });
    let store = keys.connect_with(liar.address, options()).await.open("world").await.unwrap();
    assert!(store.read(Extent::page(3)).await.unwrap_err().is_transient());
    let error = soon("a read", store.read(Extent::page(3))).await.unwrap_err();
    assert!(is_protocol(&error) && error.to_string().contains("131072 bytes now and had 262144"), "{error}");
}

/// Dropped on the peer's own service while OPEN is on its way: the answer must not be taken for that of the next OPEN.
#[tokio::test(flavor = "multi_thread")]
async fn the_answer_to_a_cancelled_open_is_not_given_to_the_next() {
    let keys = Keys::new();
    let liar = Liar::start(&keys.server, |mut asked| async move {
        asked.say(&welcome()).await;
        loop {
            let name = asked.next().await.payload[1];
            asked.say(&opened(u32::from(name), u64::from(name))).await;
        }
    });
    let peer = keys.connect_with(liar.address, options()).await;
    let service = peer.service().clone();
    let sizes = tokio::task::spawn_blocking(move || {
        service.run(async move {
            let mut cancelled = Box::pin(peer.open("\u{1}"));
            let _ = cancelled.as_mut().poll(&mut std::task::Context::from_waker(std::task::Waker::noop()));
            drop(cancelled);
            (peer.open("\u{2}").await.unwrap().size(), peer.open("\u{1}").await.unwrap().size())
        })
    });
    assert_eq!(soon("two regions", sizes).await.unwrap(), Some((2, 1)));
}

/// Writes larger than the server's window are stuck half-written; one of them is dropped while another waits for the same stream. What the
/// server then reads must be whole frames, and half a one only at the end of a stream.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_written_behind_half_a_frame() {
    const MIB_PAGES: u64 = 256;
    const LANES: u64 = 4;
    let (started, go) = (Arc::new(Notify::new()), Arc::new(tokio::sync::Semaphore::new(0)));
    let mut transport = quinn::TransportConfig::default();
    transport.stream_receive_window((256u32 << 10).into());
    let keys = Keys::new();
    let liar = Liar::start_with(&keys.server, transport, {
        let (started, go) = (started.clone(), go.clone());
        move |mut asked| {
            let (started, go) = (started.clone(), go.clone());
            async move {
                if asked.first.kind == HELLO {
                    return asked.control((LANES + 1) * MIB_PAGES).await;
                }
                started.notify_one();
                drop(go.acquire().await.unwrap());
                while let Some(got) = Got::read(&mut asked.receive).await {
                    let extent = Extent::new(got.u64_at(8), got.u32_at(4).into()).unwrap();
                    assert!((got.kind, got.flags) == (WRITE, RAW) && got.payload[16..] == *noise(extent), "{extent} was garbled");
                    // An answer to the write that was dropped must not reach another.
                    let answer = if extent.first() == 0 { frame(FAILED, 0, &[6, 0, 0, 0]) } else { frame(DONE, 0, &[]) };
                    asked.say(&answer).await;
                }
            }
        }
    });
    let patient = TransportOptions { compress: false, ..TransportOptions::default() };
    let store = keys.connect_with(liar.address, patient).await.open("world").await.unwrap();
    let mut writes: Vec<_> = Vec::new();
    for number in 0..LANES {
        let extent = Extent::between(number * MIB_PAGES, (number + 1) * MIB_PAGES);
        let mut write = Box::pin({
            let store = store.clone();
            async move { store.write(extent, noise(extent)).await }
        });
        tokio::select! {
            done = &mut write => panic!("{done:?} without being read"),
            () = started.notified() => writes.push(write),
        }
    }
    let last = Extent::between(LANES * MIB_PAGES, (LANES + 1) * MIB_PAGES);
    let mut behind = Box::pin(store.write(last, noise(last)));
    assert!(behind.as_mut().poll(&mut std::task::Context::from_waker(std::task::Waker::noop())).is_pending());
    drop(writes.swap_remove(0));
    go.add_permits(100);
    soon("the write behind the dropped one", behind).await.unwrap();
    for write in writes {
        soon("a write", write).await.unwrap();
    }
}

/// Bytes for [`nothing_is_written_behind_half_a_frame`] that are not zeros, so that they travel.
fn noise(extent: Extent) -> &'static [u8] {
    static NOISE: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(|| {
        let mut random = Random(3);
        (0..(5 << 20) / 8).flat_map(|_| random.next().to_le_bytes()).collect()
    });
    &NOISE[extent.first() as usize * PAGE..extent.end() as usize * PAGE]
}

mod pulls {
    use super::*;

    /// Lies in a pull of pages 4..8 and 20..24.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_lie_in_a_pull_is_an_error() {
        let of = |first: u64, end: u64| honest_data(Extent::between(first, end));
        let lies = [
            ("pages that were not asked for", of(0, 2)),
            ("pages of two extents in one", of(4, 24)),
            ("a page twice", [of(4, 6), of(5, 6)].concat()),
            ("an extent twice", [of(4, 8), of(20, 24), of(20, 24)].concat()),
            ("an earlier extent", [of(20, 22), of(4, 8)].concat()),
            ("DONE", frame(DONE, 0, &[])),
            ("an unknown kind", header(0x66, 0, 0)),
            ("fewer bytes than pages", data(4, 4, RAW, contents(Extent::between(4, 7)))),
            ("an LZ4 bomb", data(4, 4, LZ4, &[&[0x1f, 0][..], &[0xff; 5000]].concat())),
        ];
        for (what, lie) in lies {
            let (_liar, store) = liar(move |mut asked| {
                let lie = lie.clone();
                async move {
                    asked.say(&lie).await;
                    std::future::pending().await
                }
            })
            .await;
            let mut pull = store.pull(vec![Extent::between(4, 8), Extent::between(20, 24)]).await.unwrap();
            let error = loop {
                match soon(what, pull.next()).await {
                    Ok(Some(run)) => assert_run(&run),
                    Ok(None) => panic!("{what}: taken for a pull that ended well"),
                    Err(error) => break error,
                }
            };
            assert!(is_protocol(&error), "{what}: {error}");
            assert!(matches!(pull.next().await, Ok(None)), "{what}: a pull that failed is over");
        }
    }

    /// A program that waits for the next pages with a time-out of its own drops `next` in the middle of a frame.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_dropped_wait_for_the_next_pages_loses_none() {
        let resume = Arc::new(tokio::sync::Semaphore::new(0));
        let (_liar, store) = liar({
            let resume = resume.clone();
            move |mut asked| {
                let resume = resume.clone();
                async move {
                    let answer =
                        [honest_data(Extent::between(0, 8)), honest_data(Extent::between(8, 16)), frame(END, 0, &[])].concat();
                    for piece in [0..24, 24..4000, 4000..answer.len()] {
                        asked.say(&answer[piece]).await;
                        resume.acquire().await.unwrap().forget();
                    }
                }
            }
        })
        .await;
        let asked = Extent::between(0, 16);
        let mut pull = store.pull(vec![asked]).await.unwrap();
        let mut runs = Vec::new();
        while runs.len() < 2 {
            match tokio::time::timeout(Duration::from_millis(20), pull.next()).await {
                Ok(next) => runs.extend(next.unwrap()),
                Err(_) => resume.add_permits(1),
            }
        }
        assert_world(asked, &runs);
        assert!(matches!(soon("the end", pull.next()).await, Ok(None)));
    }
}

mod regions {
    use super::*;

    /// A region over `store`'s liar that gives up soon.
    async fn region(keys: &Keys, liar: &Liar) -> (Pager, Region) {
        let pager = Pager::start(&PagerOptions::default()).unwrap();
        let trust = Trust::ids([keys.server.peer_id()]);
        let peer = Peer::builder(liar.address, trust, &keys.client).transport(options()).service(pager.service()).connect().await;
        let store = peer.unwrap().open("world").await.unwrap();
        let loss = LossPolicy { keep_trying: Duration::from_millis(500), ..LossPolicy::default() };
        let region = Region::builder().store(store).pager(&pager).loss(loss).open().unwrap();
        (pager, region)
    }

    /// Whatever the lie: what waits for pages gets an error within the bound, and no page is resident that was not sent as what it is.
    #[tokio::test(flavor = "multi_thread")]
    async fn lies_end_in_lost_pages_and_never_in_wrong_ones() {
        if !userfaultfd() {
            return;
        }
        let lies = [
            ("silence", vec![]),
            ("other pages", honest_data(Extent::between(40, 41))),
            ("too many pages", data(0, PAGES as u32 * 2, ZERO, &[])),
            ("a short page", data(0, 1, RAW, &[7; PAGE / 2])),
            ("END", frame(END, 0, &[])),
        ];
        for (what, lie) in lies {
            let keys = Keys::new();
            let liar = Liar::start(&keys.server, move |mut asked| {
                let lie = lie.clone();
                async move {
                    match asked.first.kind {
                        HELLO => return asked.control(PAGES).await,
                        LANE => drop(asked.next().await),
                        _ => {}
                    }
                    asked.say(&lie).await;
                    std::future::pending().await
                }
            });
            let (_pager, region) = region(&keys, &liar).await;
            let populate = soon(what, region.populate(0..PAGE as u64)).await;
            assert!(matches!(populate, Err(pageferry::RegionError::Lost { .. })), "{what}: {populate:?}");
            let pull = soon(what, region.pull()).await;
            assert!(matches!(pull, Err(pageferry::RegionError::Lost { .. })), "{what}: {pull:?}");
            let pulled: Vec<Extent> = region.resident_extents();
            let honest = if what == "other pages" { vec![Extent::between(40, 41)] } else { vec![] };
            assert_eq!(pulled, honest, "{what}");
        }
    }

    /// A page was demanded, so the pull leaves it out and ends; the datagram with the page itself is late. It must not be given up.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_pull_that_ends_before_a_demanded_page_has_come_loses_nothing() {
        if !userfaultfd() {
            return;
        }
        let keys = Keys::new();
        let (pulls, demanded) = (Arc::new(AtomicU64::new(0)), Arc::new(tokio::sync::Semaphore::new(0)));
        let (late, release) = (Arc::new(tokio::sync::Semaphore::new(0)), Arc::new(Notify::new()));
        let liar = Liar::start(&keys.server, {
            let (pulls, demanded, late, release) = (pulls.clone(), demanded.clone(), late.clone(), release.clone());
            move |mut asked| {
                let (pulls, demanded, late, release) = (pulls.clone(), demanded.clone(), late.clone(), release.clone());
                async move {
                    match asked.first.kind {
                        HELLO => asked.control(1).await,
                        LANE => {
                            assert_eq!(asked.next().await.extent(), Extent::page(0));
                            demanded.add_permits(1);
                            late.acquire().await.unwrap().forget();
                            asked.say(&honest_data(Extent::page(0))).await;
                            asked.next().await;
                        }
                        _ if pulls.fetch_add(1, SeqCst) == 0 => {
                            release.notify_one();
                            demanded.acquire().await.unwrap().forget();
                            asked.say(&frame(END, 0, &[])).await;
                            // The client ends its side once it has read END.
                            while Got::read(&mut asked.receive).await.is_some() {}
                            late.add_permits(1);
                        }
                        _ => asked.honest().await,
                    }
                }
            }
        });
        let (_pager, region) = region(&keys, &liar).await;
        let pulling = tokio::spawn({
            let region = region.clone();
            async move { region.pull().await }
        });
        soon("the pull", release.notified()).await;
        soon("the page", region.populate(0..PAGE as u64)).await.unwrap();
        soon("the pull", pulling).await.unwrap().unwrap();
        assert_eq!((region.residency().missing(), region.residency().lost), (0, 0));
    }
}
