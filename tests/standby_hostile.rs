//! What a source may do to its standby, and a standby to its source, that neither should (S6, S7).

#[path = "common/net.rs"]
mod net;
#[path = "common/program.rs"]
mod program;
#[path = "common/raw.rs"]
mod raw;

use net::{Asked, Got, LOOPBACK, PAGE, RAW, data, frame, soon, userfaultfd};
use pageferry::{MoveError, MoveEvent, Standby, StandbyOptions};
use program::{Keys, Ledger, Program, wait_for, world};
use raw::{ABORT, DEPOSE, Handover, KEPT, LACKS, MAPPED, MARK, NOT_OWNER, PROMOTE, RawDestination, RawSource};
use tokio::sync::mpsc;

const PAGES: u64 = 4;

/// A standby whose source is the test's.
struct Stage {
    source: RawSource,
    feeds: mpsc::UnboundedReceiver<Asked>,
    keys: Keys,
}

impl Stage {
    fn new() -> Stage {
        let keys = Keys::new();
        let (feed, feeds) = mpsc::unbounded_channel();
        let source = RawSource::with_feeds(&keys.here, PAGES, move |asked| {
            let _ = feed.send(asked);
            std::future::ready(())
        });
        Stage { source, feeds, keys }
    }

    /// Up to its first point, in which every page is full of ones.
    async fn first_point(&mut self) -> (Standby, Handover, Asked) {
        let connect = self.keys.destination(self.source.address).connect();
        let destination = soon("connecting", connect).await.unwrap();
        let standing = tokio::spawn(async move { destination.stand_by(StandbyOptions::default()).await });
        let mut handover = self.source.taken().await;
        handover.offer(2, "heap", PAGES * PAGE as u64, 0).await;
        handover.expect(MAPPED).await;
        let mut feed = soon("a feed", self.feeds.recv()).await.unwrap();
        feed.say(&[pages(0, PAGES as u32, 1), mark(1)].concat()).await;
        handover.point(1).await;
        handover.expect(KEPT).await;
        (soon("the first point", standing).await.unwrap().unwrap(), handover, feed)
    }
}

fn pages(first: u64, count: u32, byte: u8) -> Vec<u8> {
    data(first, count, RAW, &vec![byte; count as usize * PAGE])
}

fn mark(number: u64) -> Vec<u8> {
    frame(MARK, 0, &number.to_le_bytes())
}

/// The first byte of each page, and the state.
fn shown(standby: &Standby) -> (Vec<u8>, Vec<u8>) {
    let point = standby.point();
    let first = (0..PAGES).map(|page| {
        let mut byte = [0];
        point.read_at("heap", page * PAGE as u64, &mut byte).unwrap();
        byte[0]
    });
    (first.collect(), point.state().to_vec())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_behind_a_mark_is_not_shown_with_its_point() {
    if !userfaultfd() {
        return;
    }
    let mut stage = Stage::new();
    let (standby, mut handover, mut feed) = stage.first_point().await;
    assert_eq!(shown(&standby), (vec![1; 4], vec![1]));
    // Page 1 is of the second point, page 2 of the third, and all of it arrives before either is announced.
    feed.say(&[pages(1, 1, 2), mark(2), pages(2, 1, 3), mark(3)].concat()).await;
    handover.point(2).await;
    handover.expect(KEPT).await;
    assert_eq!(shown(&standby), (vec![1, 2, 1, 1], vec![2]));
    handover.point(3).await;
    handover.expect(KEPT).await;
    assert_eq!(shown(&standby), (vec![1, 2, 3, 1], vec![3]));
    assert_eq!(standby.point().number(), 3);
}

/// Of a state, a mebibyte each.
const PIECES: u64 = 64;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promotion_in_the_middle_of_a_state_loses_nothing_of_it() {
    if !userfaultfd() {
        return;
    }
    let mut stage = Stage::new();
    let (standby, mut handover, mut feed) = stage.first_point().await;
    feed.say(&[pages(1, 1, 2), mark(2)].concat()).await;
    let piece = vec![7; 1 << 20];
    handover.announce(2, PIECES << 20).await;
    // More than a stream holds that nobody reads: the standby is in the middle of it when all but the last is sent.
    for _ in 1..PIECES {
        handover.state(&piece).await;
    }
    let promoting = async {
        tokio::select! {
            moved = standby.promote() => panic!("nobody gave it the program: {moved:?}"),
            () = async {
                handover.expect(PROMOTE).await;
                handover.state(&piece).await;
                handover.expect(KEPT).await;
            } => {}
        }
    };
    soon("the point", promoting).await;
    let (first, state) = shown(&standby);
    assert_eq!((first, state.len() as u64), (vec![1, 2, 1, 1], PIECES << 20));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_breaks_the_protocol_ends_the_standby_and_leaves_the_last_point() {
    if !userfaultfd() {
        return;
    }
    let lacks = frame(LACKS, 0, &[&1u32.to_le_bytes()[..], &[0], &[0; 8], &1u64.to_le_bytes()].concat());
    let outside = pages(PAGES, 1, 2);
    let lies = [
        ("a mark of another point", [pages(0, 1, 2), mark(7)].concat()),
        ("a mark of the last point", [pages(0, 1, 2), mark(1)].concat()),
        ("the mark of a promotion", [pages(0, 1, 2), mark(u64::MAX)].concat()),
        ("something that it lacks", [pages(0, 1, 2), lacks].concat()),
        ("a page outside the region", [pages(0, 1, 2), outside, mark(2)].concat()),
        ("a frame that is no frame", [pages(0, 1, 2), frame(0x7f, 0, &[])].concat()),
    ];
    for (lie, said) in lies {
        let mut stage = Stage::new();
        let (standby, mut handover, mut feed) = stage.first_point().await;
        feed.say(&said).await;
        handover.point(2).await;
        let error = soon("the end", standby.ended()).await;
        assert!(matches!(error, MoveError::Protocol(_)), "{lie}: {error}");
        assert_eq!(shown(&standby), (vec![1; 4], vec![1]), "{lie}");
        let moved = soon("taking over", standby.take_over()).await.unwrap();
        let mut byte = [0];
        moved.regions()[0].read_at(0, &mut byte).unwrap();
        assert_eq!((byte, moved.state()), ([1], &[1u8][..]), "{lie}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_regions_under_the_same_session_are_not_mixed_into_a_point() {
    if !userfaultfd() {
        return;
    }
    let mut stage = Stage::new();
    let (standby, handover, feed) = stage.first_point().await;
    drop((handover, feed));
    let mut again = stage.source.taken().await;
    again.offer(3, "another", PAGES * PAGE as u64, 0).await;
    let error = soon("the end", standby.ended()).await;
    assert!(matches!(error, MoveError::Protocol(_)), "{error}");
    assert_eq!(shown(&standby), (vec![1; 4], vec![1]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_a_standby_of_the_program_deposes_its_source() {
    if !userfaultfd() {
        return;
    }
    let (keys, ledger, regions) = (Keys::new(), Ledger::new(), world(&["heap"], 64));
    let program = Program::start(&regions, &ledger);
    let source = keys.source(&regions, &program.gate).listen(LOOPBACK).unwrap();
    let depose = |session: u128, epoch: u64| frame(DEPOSE, 0, &[&session.to_le_bytes()[..], &epoch.to_le_bytes()].concat());
    let code = |answers: &[Got]| answers.first().map(|got| (got.kind, u16::from_le_bytes([got.payload[24], got.payload[25]])));
    let high = 1 << 40;

    let known = RawDestination::connect(source.local_addr(), &keys.there).await;
    assert_eq!(code(&known.client.say(&depose(1, high)).await), Some((ABORT, NOT_OWNER)), "a session that never was");
    // One that copies, and does not stand by.
    let mut handover = known.take_by(1, &raw::HYBRID).await;
    handover.up_to(MAPPED).await;
    assert_eq!(code(&known.client.say(&depose(1, high)).await), Some((ABORT, NOT_OWNER)), "a session that copies");
    drop(handover);
    ledger.advances().await;

    let mut news = source.events();
    let standby = keys.destination(source.local_addr()).connect().await.unwrap();
    // Once the one before is over.
    let standby = loop {
        match standby.stand_by(StandbyOptions::default()).await {
            Ok(standby) => break standby,
            Err(MoveError::Aborted { .. }) => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    };
    assert_eq!(
        code(&known.client.say(&depose(1, high)).await),
        Some((ABORT, NOT_OWNER)),
        "another session than that which stands by"
    );
    ledger.advances().await;
    assert!(source.owns());
    drop(standby);
    wait_for(&mut news, "the end of it", |event| matches!(event, MoveEvent::Aborted { .. } | MoveEvent::Interrupted { .. })).await;
    ledger.advances().await;
    program.quit();
}
