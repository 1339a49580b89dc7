//! What S6 promises when the path between the ends is lost, or an answer on it: connections cut and restored, datagrams lost, repeated and
//! late, a source that is gone or is another one when it is asked again.

#[path = "common/net.rs"]
mod net;
#[path = "common/program.rs"]
mod program;
#[path = "common/proxy.rs"]
mod proxy;
#[path = "common/raw.rs"]
mod raw;

use net::{HANG, LOOPBACK, soon, userfaultfd};
use pageferry::{Destination, LossPolicy, MoveError, MoveEvent, Moved, OnLoss, Region, RegionError, RegionEvent, Source, Strategy};
use program::{Keys, Ledger, Program, check, check_stamps, gated, is_aborted, poison_soon, short_idle, until, wait_for, world};
use proxy::{Proxy, Weather};
use raw::{COMMIT, MAPPED, READY, RESUMED, RawSource};
use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::broadcast::Receiver;

async fn take(destination: &Destination) -> Result<Moved, MoveError> {
    soon("taking", destination.take(Strategy::post_copy())).await
}

async fn connect(keys: &Keys, address: SocketAddr, loss: LossPolicy) -> Destination {
    soon("connecting", keys.destination(address).loss(loss).connect()).await.unwrap()
}

fn patient() -> LossPolicy {
    LossPolicy { keep_trying: HANG, then: OnLoss::Poison }
}

fn is_lost<T: std::fmt::Debug>(outcome: &Result<T, MoveError>) -> bool {
    matches!(outcome, Err(MoveError::Region(RegionError::Lost { .. })))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_whose_answer_was_lost_asks_again_and_gets_it() {
    if !userfaultfd() {
        return;
    }
    let keys = Keys::new();
    let mut source = RawSource::listen(&keys.here, 1);
    let destination = connect(&keys, source.address, poison_soon()).await;
    let taking = tokio::spawn(async move { take(&destination).await });
    let mut first = source.taken().await;
    let session = first.session;
    first.offer(2, "heap", 4096, 0).await;
    first.expect(MAPPED).await;
    first.prepare().await;
    first.expect(READY).await;
    drop(first);
    // Lost once more before it is answered.
    assert_eq!(source.taken().await.session, session);
    let mut again = source.taken().await;
    assert_eq!(again.session, session);
    again.epoch = 2;
    again.say(COMMIT).await;
    again.expect(RESUMED).await;
    assert_eq!(taking.await.unwrap().unwrap().epoch(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_that_was_ready_runs_only_on_a_commit_of_its_own_attempt() {
    if !userfaultfd() {
        return;
    }
    for answer in ["nothing", "an offer anew", "an abort", "commits of another epoch"] {
        let keys = Keys::new();
        let mut source = RawSource::listen(&keys.here, 1);
        let limit = Duration::from_secs(1);
        let destination = soon("connecting", keys.destination(source.address).decision_limit(limit).connect()).await.unwrap();
        let taking = tokio::spawn(async move { take(&destination).await });
        let mut handover = source.taken().await;
        handover.offer(2, "heap", 4096, 0).await;
        handover.expect(MAPPED).await;
        handover.prepare().await;
        handover.expect(READY).await;
        drop(handover);
        let mut again = source.taken().await;
        match answer {
            "nothing" => source.close(),
            // It begins anew: the attempt that it was ready for is over.
            "an offer anew" => {
                again.offer(3, "heap", 4096, 0).await;
                again.epoch = 2;
                again.say(COMMIT).await;
                again.epoch = 3;
                again.expect(MAPPED).await;
                again.prepare().await;
                again.expect(READY).await;
                again.say(COMMIT).await;
                again.expect(RESUMED).await;
            }
            "an abort" => again.abort("the program runs on").await,
            _ => {
                again.epoch = 3;
                tokio::spawn(async move {
                    // For ever, if the destination lets it.
                    for _ in 0..400 {
                        again.say(COMMIT).await;
                        tokio::time::sleep(limit / 20).await;
                    }
                });
            }
        }
        let outcome = taking.await.unwrap();
        match (&outcome, answer) {
            (Err(MoveError::Unknown { waited, reason }), "nothing" | "commits of another epoch") => {
                assert!(*waited >= limit && !reason.is_empty(), "{answer}: {outcome:?}");
            }
            (Err(MoveError::Aborted { reason }), "an abort") => assert!(reason.contains("runs on"), "{answer}: {reason}"),
            (Ok(moved), "an offer anew") => assert_eq!(moved.epoch(), 3),
            _ => panic!("{answer}: {outcome:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_that_failed_leaves_its_addresses_free_for_the_next() {
    if !userfaultfd() {
        return;
    }
    const AT: u64 = 0x2200_0000_0000;
    const SIZE: u64 = 16 << 20;
    let keys = Keys::new();
    let mut source = RawSource::listen(&keys.here, SIZE / 4096);
    let destination = Arc::new(connect(&keys, source.address, poison_soon()).await);
    for epoch in 2..42 {
        let again = destination.clone();
        let taking = tokio::spawn(async move { take(&again).await });
        let mut handover = source.taken().await;
        handover.offer(epoch, "heap", SIZE, AT).await;
        handover.expect(MAPPED).await;
        handover.abort("not yet").await;
        let outcome = taking.await.unwrap();
        assert!(matches!(&outcome, Err(MoveError::Aborted { reason }) if reason == "not yet"), "{outcome:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_lies_about_what_is_lacking_is_refused() {
    if !userfaultfd() {
        return;
    }
    for lie in [vec![(0, 5)], vec![(4, 1)], vec![(u64::MAX, 1)], vec![(1, 1); 5]] {
        let keys = Keys::new();
        let mut source = RawSource::that_lacks(&keys.here, 4, lie.clone());
        // Kept until the last word has arrived.
        let destination = Arc::new(connect(&keys, source.address, poison_soon()).await);
        let taker = destination.clone();
        let taking = tokio::spawn(async move { take(&taker).await });
        let mut handover = source.taken().await;
        handover.offer(2, "heap", 4 * 4096, 0).await;
        handover.expect(MAPPED).await;
        handover.prepare().await;
        assert!(handover.aborted().await.1.contains("protocol"), "{lie:?}");
        let outcome = soon("the refusal", taking).await.unwrap();
        assert!(matches!(outcome, Err(MoveError::Protocol(_))), "{lie:?}: {outcome:?}");
    }
}

/// A program and its source behind a proxy.
struct Stage {
    keys: Keys,
    ledger: Arc<Ledger>,
    program: Program,
    source: Source,
    proxy: Proxy,
}

impl Stage {
    fn new(weather: Weather, seed: u64) -> Stage {
        let (keys, ledger, regions) = (Keys::new(), Ledger::new(), world(&["heap", "stack"], 256));
        let program = Program::start(&regions, &ledger);
        let source = keys.source(&regions, &program.gate).listen(LOOPBACK).unwrap();
        let proxy = Proxy::in_weather(source.local_addr(), weather, seed);
        Stage { keys, ledger, program, source, proxy }
    }

    async fn connect(&self) -> Destination {
        connect(&self.keys, self.proxy.address, patient()).await
    }

    async fn has_moved(self, moved: &Moved) {
        self.program.has_left();
        let there = Program::start(moved.regions(), &self.ledger);
        self.ledger.advances().await;
        soon("the last page", moved.complete()).await.unwrap();
        soon("the departure", self.source.departed()).await.unwrap();
        there.quit();
        check(moved.regions(), &self.ledger);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_moves_over_a_path_that_loses_repeats_and_reorders() {
    if !userfaultfd() {
        return;
    }
    for (seed, percent) in [(1, 1), (2, 5), (3, 10), (4, 20)] {
        let stage = Stage::new(Weather { lost: percent, repeated: percent, late: percent }, seed);
        let destination = stage.connect().await;
        loop {
            match take(&destination).await {
                Ok(moved) => break stage.has_moved(&moved).await,
                // The pause limit may pass on such a path; then nothing has happened.
                Err(MoveError::Aborted { .. } | MoveError::Lost { .. }) => stage.ledger.advances().await,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_path_cut_around_the_commit_leaves_one_owner_and_both_ends_agree() {
    if !userfaultfd() {
        return;
    }
    let rounds: Vec<_> = (0..12).map(|round| tokio::spawn(cut_around_the_commit(round))).collect();
    for round in rounds {
        round.await.unwrap();
    }
}

async fn cut_around_the_commit(round: usize) {
    let stage = Stage::new(Weather::default(), 0);
    let mut told = stage.source.events();
    let destination = Arc::new(stage.connect().await);
    let taking = tokio::spawn({
        let destination = destination.clone();
        async move { take(&destination).await }
    });
    wait_for(&mut told, "the pause", |event| *event == MoveEvent::Paused).await;
    match round % 3 {
        0 => stage.proxy.to_source(false),
        1 => stage.proxy.to_destination(false),
        _ => stage.proxy.both(false),
    }
    let decided = |event: &MoveEvent| is_aborted(event) || *event == MoveEvent::Committed { epoch: 2 };
    wait_for(&mut told, "the decision", decided).await;
    if round >= 6 {
        // So long that the connection does not survive it.
        until("the connection is lost", || destination.peer().rtt().is_none()).await;
    }
    stage.proxy.both(true);
    let outcome = taking.await.unwrap();
    // After an attempt that was given up the destination may have gone on in another, or been told no.
    let moved = match outcome {
        Ok(moved) => moved,
        Err(MoveError::Aborted { .. } | MoveError::Lost { .. }) => {
            assert!(stage.source.owns());
            stage.ledger.advances().await;
            take(&destination).await.unwrap()
        }
        Err(error) => panic!("{error}"),
    };
    stage.has_moved(&moved).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_goes_on_after_the_path_was_cut() {
    if !userfaultfd() {
        return;
    }
    let (keys, ledger) = (Keys::new(), Ledger::new());
    let (archive, pages) = gated("archive", 512);
    let regions = [world(&["heap"], 64).remove(0), archive];
    let program = Program::start(&regions[..1], &ledger);
    let source = keys.source(&regions, &program.gate).listen(LOOPBACK).unwrap();
    let proxy = Proxy::start(source.local_addr());
    let moved = take(&connect(&keys, proxy.address, patient()).await).await.unwrap();
    program.has_left();
    let (mut heap_news, mut archive_news) = (moved.regions()[0].events(), moved.regions()[1].events());
    let mut told = source.events();
    soon("the pull of the archive", pages.arrived(1)).await;
    proxy.both(false);
    let away = async |news: &mut Receiver<RegionEvent>| while !matches!(news.recv().await, Ok(RegionEvent::StoreAway { .. })) {};
    // Whichever is asked for first: the heap may have been cut off too.
    soon("the loss", async {
        tokio::select! { () = away(&mut heap_news) => {}, () = away(&mut archive_news) => {} }
    })
    .await;
    pages.open();
    proxy.both(true);
    // And once more before RELEASED has come.
    wait_for(&mut told, "COMPLETE", |event| *event == MoveEvent::Complete).await;
    proxy.both(false);
    let cut = Instant::now();
    tokio::time::sleep_until((cut + short_idle().idle_timeout * 3 / 2).into()).await;
    proxy.both(true);
    soon("the last page", moved.complete()).await.unwrap();
    soon("the departure", source.departed()).await.unwrap();
    check(&moved.regions()[..1], &ledger);
    check_stamps(&moved.regions()[1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_may_end_as_soon_as_its_program_has_departed() {
    if !userfaultfd() {
        return;
    }
    for _ in 0..10 {
        let stage = Stage::new(Weather::default(), 0);
        let moved = take(&stage.connect().await).await.unwrap();
        let mut told = moved.events();
        soon("the departure", stage.source.departed()).await.unwrap();
        drop(stage.source);
        wait_for(&mut told, "RELEASED", |event| *event == MoveEvent::Released).await;
        soon("the last page", moved.complete()).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_are_not_pulled_from_a_source_that_was_started_anew() {
    if !userfaultfd() {
        return;
    }
    let (keys, ledger) = (Keys::new(), Ledger::new());
    let regions = [world(&["heap"], 64).remove(0), gated("archive", 64).0];
    let program = Program::start(&regions[..1], &ledger);
    let source = keys.source(&regions, &program.gate).listen(LOOPBACK).unwrap();
    let moved = take(&connect(&keys, source.local_addr(), patient()).await).await.unwrap();
    let address = source.local_addr();
    drop(source);
    // Same key, same address, same names, other memory.
    let fresh = [world(&["heap"], 64).remove(0), Region::builder().name("archive").size(64 * 4096).open().unwrap()];
    let mut anew = keys.source(&fresh, &pageferry::Gate::new()).listen(address);
    until("the port is free", || {
        anew.is_ok() || {
            anew = keys.source(&fresh, &pageferry::Gate::new()).listen(address);
            false
        }
    })
    .await;
    let outcome = soon("the loss", moved.complete()).await;
    assert!(is_lost(&outcome), "{outcome:?}");
    let mut bytes = [0; 8];
    let read = moved.regions()[1].read_at(4088, &mut bytes);
    assert!(matches!(read, Err(RegionError::Lost { .. })), "{read:?} {bytes:?}");
    assert!(anew.unwrap().owns(), "the other program is left alone");
    program.has_left();
}
