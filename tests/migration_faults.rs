//! What S6 promises when a handover goes wrong, between ends of one process: cancelled, dropped, asked twice, cut off, out of order.
//!
//! Method: where it matters at which step the destination stops, the test is the destination and speaks the protocol by hand. The program's state is its ledger as of the pause: where it differs from the ledger of
//! the program that has left, the program ran on after its state was taken.

#[path = "common/net.rs"]
mod net;
#[path = "common/program.rs"]
mod program;
#[path = "common/raw.rs"]
mod raw;

use net::{LOOPBACK, soon, userfaultfd};
use pageferry::{Destination, Gate, Identity, MoveError, MoveEvent, Moved, NetError, Region, Source, SourceBuilder, Strategy};
use program::{Keys, Ledger, Program, check, is_aborted, wait_for, world};
use raw::{COMMIT, COMPLETE, MAPPED, NOT_OWNER, OFFER, PREPARE, READY, RELEASED, RESUMED, RawDestination};
use std::{
    collections::BTreeSet,
    future::pending,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};
use tokio::sync::Notify;

/// A program at its source.
struct Stage {
    keys: Keys,
    ledger: Arc<Ledger>,
    regions: Vec<Region>,
    program: Program,
    source: Source,
}

fn ledger_as_state(ledger: &Ledger) -> Vec<u8> {
    ledger.done().iter().flat_map(|done| done.to_le_bytes()).collect()
}

impl Stage {
    fn new() -> Stage {
        Stage::with(|_, builder| builder)
    }

    fn with(describe: impl for<'a> FnOnce(&Gate, SourceBuilder<'a>) -> SourceBuilder<'a>) -> Stage {
        let (keys, ledger, regions) = (Keys::new(), Ledger::new(), world(&["heap"], 64));
        let program = Program::start(&regions, &ledger);
        let counted = ledger.clone();
        let builder = describe(&program.gate, keys.source(&regions, &program.gate).state(move || ledger_as_state(&counted)));
        let source = builder.listen(LOOPBACK).unwrap();
        Stage { keys, ledger, regions, program, source }
    }

    async fn raw(&self) -> RawDestination {
        RawDestination::connect(self.source.local_addr(), &self.keys.there).await
    }

    async fn take(&self) -> Result<Moved, MoveError> {
        take(&self.keys, self.source.local_addr()).await
    }

    /// The program runs at the source, and can be taken with nothing lost.
    async fn moves_unharmed(self) {
        self.ledger.advances().await;
        assert!(self.source.owns());
        let moved = self.take().await.unwrap();
        self.has_moved(&moved).await;
    }

    /// The program has left with the state that it had when it was paused; it runs on at its new place.
    async fn has_moved(self, moved: &Moved) {
        self.program.has_left();
        assert_eq!(moved.state(), ledger_as_state(&self.ledger), "the program ran on after its state was taken");
        let there = Program::start(moved.regions(), &self.ledger);
        self.ledger.advances().await;
        soon("the last page", moved.complete()).await.unwrap();
        there.quit();
        check(moved.regions(), &self.ledger);
    }
}

async fn connect(keys: &Keys, address: SocketAddr) -> Destination {
    soon("connecting", keys.destination(address).connect()).await.unwrap()
}

async fn take(keys: &Keys, address: SocketAddr) -> Result<Moved, MoveError> {
    soon("taking", connect(keys, address).await.take(Strategy::post_copy())).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_a_granted_peer_takes_and_only_one_does() {
    if !userfaultfd() {
        return;
    }
    let stage = Stage::new();
    let stranger = Keys { here: Identity::from_pem(&stage.keys.here.to_pem()).unwrap(), there: Identity::generate().unwrap() };
    let refused = soon("a refusal", stranger.destination(stage.source.local_addr()).connect()).await;
    assert!(matches!(refused, Err(MoveError::Net(NetError::Rejected { .. }))), "{refused:?}");

    let raw = stage.raw().await;
    let mut first = raw.take(1).await;
    first.up_to(PREPARE).await;
    let in_progress = stage.take().await;
    assert!(matches!(&in_progress, Err(MoveError::Aborted { reason }) if reason.contains("another session")), "{in_progress:?}");
    first.say(READY).await;
    first.expect(COMMIT).await;
    let committed = stage.take().await;
    assert!(matches!(&committed, Err(MoveError::Aborted { reason }) if reason.contains("another session")), "{committed:?}");
    assert_eq!(raw.take(2).await.aborted().await.0, NOT_OWNER);
    stage.program.has_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancelling_before_the_commit_tells_the_destination_and_the_program_runs_on() {
    if !userfaultfd() {
        return;
    }
    let stage = Stage::new();
    assert!(!stage.source.cancel().await, "there is nothing to cancel");
    for (session, step) in [(1, OFFER), (2, PREPARE)] {
        let mut told = stage.source.events();
        let raw = stage.raw().await;
        let mut handover = raw.take(session).await;
        handover.up_to(step).await;
        assert!(stage.source.cancel().await && stage.source.owns());
        wait_for(&mut told, "the abort", is_aborted).await;
        stage.ledger.advances().await;
        assert!(handover.aborted().await.1.contains("called"), "the destination is told without asking");
        assert!(!stage.source.cancel().await);
    }
    stage.moves_unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_at_any_moment_never_leaves_the_program_paused() {
    if !userfaultfd() {
        return;
    }
    let stage = Stage::new();
    let raw = stage.raw().await;
    let mut cancelled = 0;
    for session in 1..=150 {
        let mut handover = raw.take(session).await;
        handover.up_to(MAPPED).await;
        // From before MAPPED arrives to after PREPARE has left.
        let start = Instant::now();
        while start.elapsed() < Duration::from_micros(20 * u64::try_from(session % 50).unwrap()) {
            std::hint::spin_loop();
        }
        cancelled += u32::from(stage.source.cancel().await);
        stage.ledger.advances().await;
    }
    assert_eq!(cancelled, 150);
    stage.moves_unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attempt_that_was_cancelled_does_not_let_the_program_run_in_the_next() {
    if !userfaultfd() {
        return;
    }
    const LIMIT: Duration = Duration::from_secs(3);
    let (pauses, pausing) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    let stage = Stage::with(|gate, builder| {
        let (pauses, pausing) = (pauses.clone(), pausing.clone());
        let pause = move || {
            let (first, pausing) = (pauses.fetch_add(1, SeqCst) == 0, pausing.clone());
            async move {
                pausing.notify_one();
                if first {
                    pending().await
                }
            }
        };
        gate.hooks(pause, || async {});
        builder.pause_limit(LIMIT)
    });
    let raw = stage.raw().await;
    let mut first = raw.take(1).await;
    first.up_to(MAPPED).await;
    soon("the first pause", pausing.notified()).await;
    let first_ends = Instant::now() + LIMIT;
    assert!(stage.source.cancel().await);
    stage.ledger.advances().await;
    // Late enough for the limit of the first pause to fall into the second.
    tokio::time::sleep_until((first_ends - LIMIT / 2).into()).await;
    let mut second = raw.take(2).await;
    second.up_to(MAPPED).await;
    let state = second.prepared().await;
    tokio::time::sleep_until((first_ends + LIMIT / 10).into()).await;
    second.say(READY).await;
    second.expect(COMMIT).await;
    stage.program.has_left();
    assert_eq!(state, ledger_as_state(&stage.ledger), "the program ran on after its state was taken");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hook_that_panics_aborts_the_attempt_and_the_program_runs_on() {
    if !userfaultfd() {
        return;
    }
    let (pauses, resumes) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let stage = Stage::with(|gate, builder| {
        let (pauses, resumes) = (pauses.clone(), resumes.clone());
        let pause = move || {
            let first = pauses.fetch_add(1, SeqCst) == 0;
            async move { assert!(!first, "a bug of the program") }
        };
        let resume = move || {
            resumes.fetch_add(1, SeqCst);
            async {}
        };
        gate.hooks(pause, resume);
        builder
    });
    let failed = stage.take().await;
    assert!(matches!(failed, Err(MoveError::Lost { .. } | MoveError::Aborted { .. })), "{failed:?}");
    stage.ledger.advances().await;
    assert_eq!(resumes.load(SeqCst), 1, "what the pause hook has begun is undone");
    stage.moves_unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_is_dropped_keeps_its_program_until_the_commit_and_not_after() {
    if !userfaultfd() {
        return;
    }
    for step in [OFFER, PREPARE, COMMIT] {
        let stage = Stage::new();
        let raw = stage.raw().await;
        let mut handover = raw.take(1).await;
        handover.up_to(step).await;
        drop(stage.source);
        if step == COMMIT {
            stage.program.has_left();
        } else {
            stage.ledger.advances().await;
            assert!(!stage.program.gate.stopped());
            stage.program.quit();
        }
        check(&stage.regions, &stage.ledger);
        let end = soon("the end of the connection", raw.client.connection.closed()).await;
        assert!(
            matches!(end, quinn::ConnectionError::ApplicationClosed(_)),
            "{end}: the destination is told, it need not time out"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_that_leaves_before_it_is_ready_changes_nothing() {
    if !userfaultfd() {
        return;
    }
    let stage = Stage::new();
    for (session, step) in [(1, OFFER), (2, MAPPED), (3, PREPARE)] {
        let mut told = stage.source.events();
        let raw = stage.raw().await;
        raw.take(session).await.up_to(step).await;
        raw.client.connection.close(0u32.into(), b"killed");
        wait_for(&mut told, "the abort", is_aborted).await;
        stage.ledger.advances().await;
    }
    stage.moves_unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_the_commit_the_same_session_gets_the_same_answer_and_the_memory() {
    if !userfaultfd() {
        return;
    }
    let stage = Stage::new();
    let (mut told, raw) = (stage.source.events(), stage.raw().await);
    let mut handover = raw.take(7).await;
    handover.up_to(READY).await;
    wait_for(&mut told, "the commit", |event| *event == MoveEvent::Committed { epoch: 2 }).await;
    raw.client.connection.close(0u32.into(), b"killed before COMMIT came");
    stage.program.has_left();
    let raw = RawDestination::connect(stage.source.local_addr(), &stage.keys.there).await;
    for _ in 0..3 {
        let mut again = raw.take(7).await;
        again.expect(COMMIT).await;
        assert_eq!(again.epoch, 2);
    }
    assert_eq!(raw.take(8).await.aborted().await.0, NOT_OWNER);
    let served = raw.read("heap", 64).await;
    let mut here = vec![0; served.len()];
    stage.regions[0].read_at(0, &mut here).unwrap();
    assert!(served == here, "the memory is served as the program left it");
    check(&stage.regions, &stage.ledger);

    let mut last = raw.take(7).await;
    for kind in [COMMIT, RELEASED] {
        last.expect(kind).await;
        last.say(if kind == COMMIT { COMPLETE } else { RESUMED }).await;
    }
    soon("the departure", stage.source.departed()).await.unwrap();
    // The region is the program's own again: RELEASED that was lost and is asked for anew does not take it.
    stage.regions[0].write_at(4096, b"something new").unwrap();
    let mut again = raw.take(7).await;
    again.expect(COMMIT).await;
    again.say(COMPLETE).await;
    again.expect(RELEASED).await;
    let mut bytes = [0; 13];
    stage.regions[0].read_at(4096, &mut bytes).unwrap();
    assert_eq!(&bytes, b"something new");
    assert!(!stage.source.owns());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_asks_twice_before_the_commit_does_not_get_two_answers() {
    if !userfaultfd() {
        return;
    }
    let (stage, session) = (Stage::new(), 5);
    let raw = stage.raw().await;
    let mut first = raw.take(session).await;
    first.up_to(OFFER).await;
    let mut second = raw.take(session).await;
    second.up_to(OFFER).await;
    assert_eq!((first.epoch, second.epoch), (2, 3), "the first attempt is over");
    second.say(MAPPED).await;
    second.prepared().await;
    // Offered anew on a third stream, so never committed on the second.
    let mut third = raw.take(session).await;
    third.up_to(OFFER).await;
    assert_eq!(third.epoch, 4);
    stage.ledger.advances().await;
    second.say(READY).await;
    while let Some((kind, _)) = second.hear().await {
        assert_ne!(kind, COMMIT);
    }
    drop((first, second, third));
    stage.moves_unharmed().await;
}

/// What a source has sent counts for the regions that it was sent to: a destination may have mapped others in an attempt of which the source never heard.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn regions_that_were_mapped_anew_get_every_page_whatever_was_sent_before() {
    if !userfaultfd() {
        return;
    }
    let (keys, region) = (Keys::new(), world(&["heap"], 64).remove(0));
    let source = keys.source(std::slice::from_ref(&region), &Gate::new()).listen(LOOPBACK).unwrap();
    let mut told = source.events();
    let all: BTreeSet<u64> = (0..64).collect();
    // Mapped for the attempt of epoch 2, and kept, and then mapped for that of epoch 4, whose MAPPED is never sent.
    for (epoch, mapped_since, expected) in [(2, 2, all.clone()), (3, 2, BTreeSet::new()), (5, 4, all.clone())] {
        let raw = RawDestination::connect(source.local_addr(), &keys.there).await;
        let mut handover = raw.take_by(1, &raw::HYBRID).await;
        handover.expect(OFFER).await;
        assert_eq!(handover.epoch, epoch);
        (handover.mapped_since, handover.credit_bytes) = (Some(mapped_since), 1 << 20);
        handover.say(MAPPED).await;
        assert_eq!(handover.fed().await, expected, "epoch {epoch}, mapped since {mapped_since}");
        raw.client.connection.close(0u32.into(), b"the path broke");
        wait_for(&mut told, "the loss", is_aborted).await;
        if epoch == 3 {
            let raw = RawDestination::connect(source.local_addr(), &keys.there).await;
            raw.take_by(1, &raw::HYBRID).await.up_to(OFFER).await;
            raw.client.connection.close(0u32.into(), b"the path broke");
            wait_for(&mut told, "the loss", is_aborted).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_out_of_order_do_not_move_the_program() {
    if !userfaultfd() {
        return;
    }
    let (stage, sessions) = (Stage::new(), AtomicU64::new(1));
    let raw = stage.raw().await;
    for (after, early) in [
        (OFFER, READY),
        (OFFER, RESUMED),
        (OFFER, COMPLETE),
        (OFFER, COMMIT),
        (PREPARE, RESUMED),
        (PREPARE, COMPLETE),
        (PREPARE, OFFER),
    ] {
        let mut handover = raw.take(sessions.fetch_add(1, SeqCst).into()).await;
        handover.up_to(after).await;
        handover.say(early).await;
        handover.aborted().await;
        stage.ledger.advances().await;
    }
    // The turn of an attempt that is over.
    let mut handover = raw.take(100).await;
    handover.up_to(PREPARE).await;
    handover.epoch -= 1;
    handover.say(READY).await;
    assert_eq!(handover.aborted().await.0, NOT_OWNER);
    stage.moves_unharmed().await;
}
