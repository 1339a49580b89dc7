//! What a hostile client may try (S7): nobody without a key gets in, and whoever has one can neither crash the server, nor make it take memory
//! for what was only claimed, nor keep it from serving others.
//!
//! Method: a client that writes bytes by hand (`common/net.rs`); after each attempt an honest client reads everything, and rightly.

#[path = "common/net.rs"]
mod common;

use common::*;
use pageferry::{Extent, Grant, Identity, MemoryStore, NetError, PageStore, Peer, PeerId, RemoteStore, Server};
use std::task::{Context, Waker};

/// Codes of FAILED, docs/protocol.md; BAD_FRAME also closes connections.
const UNKNOWN_VERSION: u16 = 1;
const NOT_GRANTED: u16 = 2;
const OUT_OF_RANGE: u16 = 4;
const BAD_FRAME: u16 = 5;
const BUSY: u16 = 7;
const NO_SESSION: u16 = 8;

/// What the server lets a client have open at once.
const STREAMS_MAX: usize = 256;
const MIB: u64 = 1 << 20;

/// A server with an honest client, and the key of a hostile one that it lets in too.
struct Stage {
    server: Server,
    server_id: PeerId,
    honest: RemoteStore,
    hostile: Identity,
}

impl Stage {
    async fn new() -> Stage {
        Stage::with(world(64)).await
    }

    /// The hostile client is granted `store` as "world".
    async fn with(store: MemoryStore) -> Stage {
        let (keys, hostile) = (Keys::new(), Identity::generate().unwrap());
        let server = Server::builder(&keys.server)
            .grant(keys.client_id(), "honest", world(64), Grant::Read)
            .grant(hostile.peer_id(), "world", store, Grant::ReadWrite)
            .listen(LOOPBACK)
            .unwrap();
        let honest = keys.connect(server.local_addr()).await.open("honest").await.unwrap();
        Stage { server, server_id: keys.server.peer_id(), honest, hostile }
    }

    async fn client(&self) -> RawClient {
        RawClient::connect(self.server.local_addr(), Some(&self.hostile)).await.unwrap()
    }

    /// The server still answers, and rightly.
    async fn assert_serves(&self) {
        let all = self.honest.extent();
        assert_world(all, &soon("an honest read", self.honest.read(all)).await.unwrap());
    }
}

/// Memory of this process that is in RAM, in bytes.
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * PAGE as u64
}

fn codes(answers: &[Got]) -> Vec<Option<u16>> {
    answers.iter().map(Got::code).collect()
}

mod who {
    use super::*;

    #[tokio::test]
    async fn a_server_with_another_key_is_not_talked_to() {
        let stage = Stage::new().await;
        let other = Identity::generate().unwrap().peer_id();
        let error = Peer::connect(stage.server.local_addr(), other, &stage.hostile).await.unwrap_err();
        assert!(matches!(&error, NetError::Rejected { reason, .. } if reason.contains("check its peer id")), "{error}");
    }

    #[tokio::test]
    async fn a_client_that_is_not_listed_is_told_what_to_do() {
        let stage = Stage::new().await;
        let stranger = Identity::generate().unwrap();
        let error = Peer::connect(stage.server.local_addr(), stage.server_id, &stranger).await.unwrap_err();
        let remedy = format!("let in {}", stranger.peer_id());
        assert!(matches!(&error, NetError::Rejected { reason, .. } if reason.contains(&remedy)), "{error}");
        stage.assert_serves().await;
    }

    /// A client's handshake ends before the server has looked at its certificate, so it is what comes back that counts.
    #[tokio::test]
    async fn a_client_without_a_listed_key_gets_not_one_byte() {
        let stage = Stage::new().await;
        let stranger = Identity::generate().unwrap();
        for identity in [None, Some(&stranger)] {
            let Ok(client) = RawClient::connect(stage.server.local_addr(), identity).await else { continue };
            assert_eq!(client.say(&[hello(1), open("world")].concat()).await, []);
            assert_eq!(client.closed().await, None, "refused by TLS, not by the protocol");
        }
        stage.assert_serves().await;
    }

    #[tokio::test]
    async fn a_client_of_another_protocol_is_refused_by_tls() {
        let stage = Stage::new().await;
        for alpn in [&b"pageferry/2"[..], b"h3", b"pageferry/"] {
            let error = RawClient::connect_as(stage.server.local_addr(), Some(&stage.hostile), alpn).await.err();
            assert!(matches!(error, Some(quinn::ConnectionError::ConnectionClosed(_))), "{error:?}");
        }
        stage.assert_serves().await;
    }
}

mod frames {
    use super::*;

    /// docs/protocol.md, "Version rule": the highest that the server speaks and that is not above the client's.
    #[tokio::test]
    async fn the_version_in_force_is_the_highest_in_common() {
        let stage = Stage::new().await;
        let client = stage.client().await;
        for version in [1, 2, u16::MAX] {
            let answers = client.say(&hello(version)).await;
            let [welcome] = &answers[..] else { panic!("{version}: {answers:?}") };
            assert_eq!((welcome.kind, &welcome.payload[..2]), (WELCOME, &[1, 0][..]), "{version}");
        }
        let refused = client.say(&[hello(0), open("world")].concat()).await;
        assert_eq!(codes(&refused), [Some(UNKNOWN_VERSION)]);
        assert!(refused[0].message().contains('1'), "{refused:?}");
        stage.assert_serves().await;
    }

    #[tokio::test]
    async fn what_breaks_the_protocol_closes_the_connection_with_a_code() {
        let stage = Stage::new().await;
        let mut random = Random(11);
        let garbage: Vec<u8> = (0..4000).map(|_| random.next() as u8 | 0x40).collect();
        let first = |bytes: Vec<u8>| bytes;
        let after_hello = |bytes: Vec<u8>| [hello(1), bytes].concat();
        let on_a_lane = |bytes: Vec<u8>| [lane(2), bytes].concat();
        let breaches = [
            ("an unknown kind", first(header(0x77, 0, 0))),
            ("kind 0", first(header(0, 0, 8))),
            ("bytes at random", first(garbage)),
            ("a length above that of any frame", first(header(HELLO, 0, u32::MAX))),
            ("a WRITE above 1 MiB", on_a_lane(header(WRITE, RAW, 16 + (1 << 20) + 1))),
            ("a PULL of too many extents", first(header(PULL, 0, 16 + 16 * 65_536 + 16))),
            (
                "a PULL whose count does not fit its length",
                first(frame(PULL, 0, &[1, 0, 0, 0, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])),
            ),
            ("flags where there are none", first(frame(LANE, 1, &[2]))),
            ("a reserved field that is set", first([&[LANE, 0, 1, 0][..], &1u32.to_le_bytes(), &[2]].concat())),
            ("a class that does not exist", first(frame(LANE, 0, &[3]))),
            ("a READ before LANE", first(read(1, 0, 1))),
            ("an answer as first frame", first(opened(1, 1))),
            ("DATA as first frame", first(data(0, 1, ZERO, &[]))),
            ("a name of no bytes", after_hello(frame(OPEN, 0, &[0, 0]))),
            ("a name that is not UTF-8", after_hello(frame(OPEN, 0, &[2, 0xff, 0xfe]))),
            ("a second HELLO", after_hello(hello(1))),
            ("a READ on the control stream", after_hello(read(1, 0, 1))),
            ("an OPEN on a lane", on_a_lane(open("world"))),
            ("a READ of no page", on_a_lane(read(1, 0, 0))),
            ("an extent past the last page there can be", on_a_lane(read(1, u64::MAX, 2))),
            ("a WRITE with an unknown encoding", on_a_lane(write(1, 0, 1, 3, &[0; PAGE]))),
        ];
        for (what, bytes) in breaches {
            let client = stage.client().await;
            let (_send, _receive) = client.stream(&bytes).await;
            assert_eq!(client.closed().await, Some(BAD_FRAME.into()), "{what}");
        }
        stage.assert_serves().await;
    }

    #[tokio::test]
    async fn a_frame_cut_short_ends_its_stream_and_nothing_else() {
        let stage = Stage::new().await;
        let client = stage.client().await;
        let region = client.open("world").await;
        let whole = [lane(2), write(region, 0, 1, RAW, &[7; PAGE])].concat();
        for len in [1, 7, 8, 9, 16, 17, 24, 33, whole.len() - 1] {
            assert_eq!(client.say(&whole[..len]).await, [], "{len} bytes");
        }
        let answers = client.say(&[lane(2), read(region, 0, 1)].concat()).await;
        assert_eq!(answers, [Got { kind: DATA, ..answers[0].clone() }], "nothing was written by half a frame");
        assert_eq!(answers[0].flags, ZERO);
        stage.assert_serves().await;
    }

    #[tokio::test]
    async fn there_is_no_program_to_take_from_a_server_of_stores() {
        let stage = Stage::new().await;
        assert_eq!(codes(&stage.client().await.say(&frame(TAKE, 0, &[&[7; 16][..], &[0; 24]].concat())).await), [Some(NO_SESSION)]);
        let client = stage.client().await;
        let region = client.open("world").await;
        assert_eq!(codes(&client.say(&feed(7, 2, region, 1 << 20)).await), [Some(NO_SESSION)]);
        assert_eq!(codes(&client.say(&feed(7, 2, region + 1, 1 << 20)).await), [Some(NOT_GRANTED)]);
        stage.assert_serves().await;
    }
}

mod reach {
    use super::*;

    #[tokio::test]
    async fn nothing_outside_an_opened_region_can_be_named() {
        let stage = Stage::new().await;
        let client = stage.client().await;
        let region = client.open("world").await;
        let requests = [
            (read(region, 64, 1), OUT_OF_RANGE),
            (read(region, 63, 2), OUT_OF_RANGE),
            (read(region, u64::MAX - 1, 1), OUT_OF_RANGE),
            (read(region, 0, u32::MAX), OUT_OF_RANGE),
            (write(region, 64, 1, RAW, &[7; PAGE]), OUT_OF_RANGE),
            (read(0, 0, 1), NOT_GRANTED),
            (read(region + 1, 0, 1), NOT_GRANTED),
            (write(u32::MAX, 0, 1, RAW, &[7; PAGE]), NOT_GRANTED),
        ];
        for (request, code) in requests {
            let answers = client.say(&[lane(2), request, read(region, 5, 1)].concat()).await;
            assert_eq!(codes(&answers), [Some(code), None], "the stream stays open after {code}");
            assert_eq!(answers[1].extent(), Extent::page(5));
        }
        for (region, extents, code) in [
            (region, vec![(0, 1), (60, 5)], OUT_OF_RANGE),
            (region, vec![(u64::MAX, 0), (u64::MAX - 1, 1)], OUT_OF_RANGE),
            (9, vec![], NOT_GRANTED),
        ] {
            assert_eq!(codes(&client.say(&pull(region, MIB, &extents)).await), [Some(code)], "{extents:?}");
        }
        // A name is opened on one connection; its number means nothing on another.
        assert_eq!(codes(&stage.client().await.say(&[lane(2), read(region, 0, 1)].concat()).await), [Some(NOT_GRANTED)]);
        stage.assert_serves().await;
    }

    #[tokio::test]
    async fn content_that_does_not_fit_its_pages_is_not_written() {
        let before = world(4);
        let stage = Stage::with(before.clone()).await;
        let client = stage.client().await;
        let region = client.open("world").await;
        let bomb = [&[0x1f, 0][..], &[0xff; 5000]].concat();
        let requests = [
            ("an LZ4 block of more than its pages", write(region, 0, 1, LZ4, &bomb)),
            ("an LZ4 block that cannot reach its pages", write(region, 0, 4, LZ4, &[0xff; 10])),
            ("an LZ4 block of nonsense", write(region, 0, 1, LZ4, &[0x0f; 300])),
            ("raw bytes for fewer pages", write(region, 0, 1, RAW, &[7; 2 * PAGE])),
            ("raw bytes for more pages", write(region, 0, 2, RAW, &[7; PAGE])),
        ];
        for (what, request) in requests {
            assert_eq!(codes(&client.say(&[lane(0), request].concat()).await), [Some(BAD_FRAME)], "{what}");
        }
        assert_world(before.extent(), &before.read(before.extent()).await.unwrap());
        stage.assert_serves().await;
    }

    /// More than a frame may carry has to be cut, zeros too, and more than 16 MiB is refused.
    #[tokio::test]
    async fn a_read_gives_at_most_16_mib_in_frames_of_at_most_1_mib() {
        let store = MemoryStore::zeroed(1 << 40, KIB_4);
        store.write(Extent::between(300, 1000), &vec![7; 700 * PAGE]).await.unwrap();
        let stage = Stage::with(store).await;
        let client = stage.client().await;
        let region = client.open("world").await;
        let pages = 16 * MIB / PAGE as u64;
        let mut next = 0;
        for got in client.say(&[lane(2), read(region, 0, pages as u32)].concat()).await {
            assert_eq!((got.kind, got.extent().first()), (DATA, next));
            assert!(got.extent().count() * PAGE as u64 <= MIB, "{} in one frame", got.extent());
            next = got.extent().end();
        }
        assert_eq!(next, pages);
        assert_eq!(codes(&client.say(&[lane(2), read(region, 0, pages as u32 + 1)].concat()).await), [Some(BAD_FRAME)]);
        stage.assert_serves().await;
    }

    #[tokio::test]
    async fn thousands_of_regions_are_too_many_for_one_connection() {
        const OPENED_MAX: usize = 4096;
        let stage = Stage::new().await;
        let names: Vec<String> = (0..OPENED_MAX + 3).map(|number| format!("region {number}")).collect();
        for name in &names {
            stage.server.grant(stage.hostile.peer_id(), name, MemoryStore::zeroed(1, KIB_4), Grant::Read);
        }
        let client = stage.client().await;
        let opens: Vec<u8> = names.iter().flat_map(|name| open(name)).collect();
        let answers = client.say(&[hello(1), opens].concat()).await;
        let (opened, refused) = answers[1..].split_at(OPENED_MAX);
        assert!(opened.iter().all(|got| got.kind == OPENED) && codes(refused) == [Some(BUSY); 3], "{refused:?}");
        // What is open already stays so, and can be asked for again.
        assert_eq!(client.say(&[hello(1), open(&names[17])].concat()).await[1], opened[17]);
        stage.assert_serves().await;
    }
}

mod hoarding {
    use super::*;

    /// Frames that claim the most and never come, on every stream there may be, from several connections.
    #[tokio::test]
    async fn streams_that_never_end_cost_others_nothing_and_little_memory() {
        let stage = Stage::new().await;
        stage.assert_serves().await;
        let before = resident_bytes();
        let mut clients = Vec::new();
        for _ in 0..4 {
            let client = stage.client().await;
            // The control stream stays open, so that all streams count.
            let mut held = vec![client.stream(&[hello(1), open("world")].concat()).await];
            let region = {
                let answers = &mut held[0].1;
                assert_eq!(soon("WELCOME", Got::read(answers)).await.unwrap().kind, WELCOME);
                soon("OPENED", Got::read(answers)).await.unwrap().u32_at(0)
            };
            let openings = [
                vec![],
                vec![HELLO, 0, 0],
                hello(1),
                [lane(2), header(WRITE, RAW, 16 + (1 << 20))].concat(),
                [lane(0), header(WRITE, LZ4, 16 + (1 << 20)), vec![0; 500]].concat(),
                [header(PULL, 0, 16 + 16 * 65_536), vec![0; 100]].concat(),
                pull(region, 0, &[(0, 64)]),
                [lane(2), read(region, 0, 64)].concat(),
            ];
            for opening in openings.iter().cycle().take(STREAMS_MAX - 1) {
                held.push(client.stream(opening).await);
            }
            let connection = client.connection.clone();
            let mut one_more = Box::pin(connection.open_bi());
            assert!(one_more.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
            drop(one_more);
            clients.push((client, held));
        }
        stage.assert_serves().await;
        let grown = resident_bytes().saturating_sub(before);
        assert!(grown < 128 * MIB, "{} MiB for {} streams", grown / MIB, clients.len() * STREAMS_MAX);
        drop(clients);
        soon("forgetting the hoarders", async {
            while stage.server.connections() > 1 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        stage.assert_serves().await;
    }

    /// Bulk reads of a store that is large but empty, with as many extents and as much credit as a frame can say: what the server keeps for
    /// each must not follow from the size of the store.
    #[tokio::test]
    async fn absurd_pulls_cost_others_nothing_and_little_memory() {
        let pages = (1u64 << 50) / PAGE as u64;
        let stage = Stage::with(MemoryStore::zeroed(1 << 50, KIB_4)).await;
        stage.assert_serves().await;
        let before = resident_bytes();
        let client = stage.client().await;
        let region = client.open("world").await;
        let everything = [(0, pages); 1000];
        let mut held = Vec::new();
        for credit_bytes in [0, 1, u64::MAX].into_iter().cycle().take(60) {
            held.push(client.stream(&pull(region, credit_bytes, &everything)).await);
        }
        for (_, receive) in &mut held {
            let got = soon("the first pages of a pull", Got::read(receive)).await.unwrap();
            assert_eq!((got.kind, got.flags, got.extent().first()), (DATA, ZERO, 0));
        }
        stage.assert_serves().await;
        let grown = resident_bytes().saturating_sub(before);
        assert!(grown < 128 * MIB, "{} MiB for {} pulls", grown / MIB, held.len());
    }

    /// Credit that runs backwards, overflows or is nonsense: the pull ends or goes on, with the right pages.
    #[tokio::test]
    async fn nonsense_credit_ends_at_most_its_own_pull() {
        let stage = Stage::new().await;
        let client = stage.client().await;
        let region = client.open("world").await;
        for then in [credit(0), credit(u64::MAX), [credit(9), credit(3)].concat(), header(0x99, 0, 0), hello(1), vec![CREDIT]] {
            let (mut send, mut receive) = client.stream(&pull(region, 1, &[(0, 64)])).await;
            let _ = send.write_all(&then).await;
            let _ = send.finish();
            let mut next = 0;
            while let Some(got) = soon("a pull's frame", Got::read(&mut receive)).await {
                if got.kind == DATA {
                    assert_eq!(got.extent().first(), next);
                    next = got.extent().end();
                }
            }
            assert!(next > 0, "not even the first pages came");
        }
        stage.assert_serves().await;
    }
}
