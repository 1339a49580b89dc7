//! Standbys: what they hold is always one moment of the program, they are promoted without loss, and a source that was taken over from runs no more.

#[path = "common/net.rs"]
mod net;
#[path = "common/program.rs"]
mod program;
#[path = "common/proxy.rs"]
mod proxy;

use net::{LOOPBACK, soon, userfaultfd};
use pageferry::{Destination, MoveError, MoveEvent, Moved, Region, Source, Standby, StandbyOptions};
use program::{
    Child, Keys, Ledger, Program, check, check_noise, check_point, done_of, fill_with_noise, live_with_parent, say, state_of, told,
    until, wait_for, world,
};
use proxy::{Proxy, Weather};
use std::{sync::Arc, time::Duration};
use tokio::sync::broadcast::Receiver;

const NAMES: [&str; 2] = ["heap", "stack"];
const PAGES: usize = 64;
const BYTES: usize = PAGES * 4096;
const NEAR: StandbyOptions = StandbyOptions { behind: Duration::from_millis(60), behind_bytes: None, hold: false };

/// A running program, and its source behind a proxy.
struct Stage {
    keys: Keys,
    ledger: Arc<Ledger>,
    program: Program,
    source: Source,
    proxy: Proxy,
}

impl Stage {
    fn new(weather: Weather, archive_pages: usize) -> Stage {
        let (keys, ledger, mut regions) = (Keys::new(), Ledger::new(), world(&NAMES, PAGES));
        let program = Program::start(&regions, &ledger);
        if archive_pages > 0 {
            let archive = Region::builder().name("archive").size((archive_pages * 4096) as u64).open().unwrap();
            fill_with_noise(&archive);
            regions.push(archive);
        }
        let counted = ledger.clone();
        let source = keys.source(&regions, &program.gate).state(move || state_of(&counted)).pause_limit(Duration::from_secs(1));
        let source = source.listen(LOOPBACK).unwrap();
        let proxy = Proxy::in_weather(source.local_addr(), weather, 7);
        Stage { keys, ledger, program, source, proxy }
    }

    async fn connect(&self) -> Destination {
        soon("connecting", self.keys.destination(self.proxy.address).connect()).await.unwrap()
    }

    async fn stand_by(&self) -> Standby {
        soon("the first point", self.connect().await.stand_by(NEAR)).await.unwrap()
    }

    /// The program runs at the standby now, and has lost nothing.
    async fn has_moved(self, moved: &Moved) {
        self.program.has_left();
        assert_eq!(done_of(moved.state()), self.ledger.done());
        check(&moved.regions()[..2], &self.ledger);
        let there = Program::start(&moved.regions()[..2], &self.ledger);
        self.ledger.advances().await;
        soon("the last page", moved.complete()).await.unwrap();
        soon("the departure", self.source.departed()).await.unwrap();
        there.quit();
        check(&moved.regions()[..2], &self.ledger);
    }
}

/// Checks points as they come.
async fn check_points(standby: &Standby, told: &mut Receiver<MoveEvent>, count: usize) {
    for _ in 0..count {
        wait_for(told, "the next point", |event| matches!(event, MoveEvent::Kept { .. })).await;
        let point = standby.point();
        check_point(&point, &NAMES, BYTES);
        assert!(point.number() > 0);
    }
}

/// Goes on from what a standby took over, with a ledger of its own.
async fn goes_on(moved: &Moved) {
    let ledger = Ledger::new();
    ledger.set(done_of(moved.state()));
    check(&moved.regions()[..2], &ledger);
    let there = Program::start(&moved.regions()[..2], &ledger);
    ledger.advances().await;
    there.quit();
    check(&moved.regions()[..2], &ledger);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_point_is_one_moment_and_a_promotion_loses_nothing() {
    if !userfaultfd() {
        return;
    }
    for weather in [Weather::default(), Weather { lost: 3, repeated: 5, late: 10 }] {
        let stage = Stage::new(weather, 0);
        let standby = stage.stand_by().await;
        let mut told = standby.events();
        check_points(&standby, &mut told, 15).await;
        let moved = soon("the promotion", standby.promote()).await.unwrap();
        assert!(matches!(standby.promote().await, Err(MoveError::Closed)));
        stage.has_moved(&moved).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_that_is_promoted_before_its_first_point_has_the_program() {
    if !userfaultfd() {
        return;
    }
    let stage = Stage::new(Weather::default(), 1024);
    let (mut news, destination) = (stage.source.events(), stage.connect().await);
    let standing = tokio::spawn(async move { destination.stand_by(NEAR).await });
    wait_for(&mut news, "the offer", |event| matches!(event, MoveEvent::Offered { .. })).await;
    assert!(stage.source.finalize());
    let standby = soon("standing by", standing).await.unwrap().unwrap();
    let moved = soon("the promotion", standby.promote()).await.unwrap();
    stage.has_moved(&moved).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_is_lost_before_the_first_point_is_an_error_in_time() {
    if !userfaultfd() {
        return;
    }
    let stage = Stage::new(Weather::default(), 1024);
    let builder = stage.keys.destination(stage.proxy.address).decision_limit(Duration::from_secs(1));
    let (mut news, destination) = (stage.source.events(), soon("connecting", builder.connect()).await.unwrap());
    let standing = tokio::spawn(async move { destination.stand_by(NEAR).await });
    wait_for(&mut news, "the offer", |event| matches!(event, MoveEvent::Offered { .. })).await;
    stage.proxy.both(false);
    if let Err(error) = soon("giving up", standing).await.unwrap() {
        assert!(matches!(error, MoveError::Lost { .. }), "{error}");
    }
    stage.ledger.advances().await;
    stage.program.quit();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_source_may_promote_its_standby() {
    if !userfaultfd() {
        return;
    }
    let stage = Stage::new(Weather::default(), 0);
    let standby = stage.stand_by().await;
    assert!(stage.source.finalize());
    let moved = soon("the promotion", standby.promote()).await.unwrap();
    stage.has_moved(&moved).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_breaks_leaves_the_last_point_and_goes_on_when_it_comes_back() {
    if !userfaultfd() {
        return;
    }
    let stage = Stage::new(Weather::default(), 1024);
    let standby = stage.stand_by().await;
    let (mut told, mut news) = (standby.events(), stage.source.events());
    check_points(&standby, &mut told, 2).await;
    for _ in 0..2 {
        stage.proxy.both(false);
        wait_for(&mut told, "the loss", |event| matches!(event, MoveEvent::Interrupted { .. })).await;
        wait_for(&mut news, "the loss there", |event| matches!(event, MoveEvent::Interrupted { .. })).await;
        let number = standby.point().number();
        check_point(&standby.point(), &NAMES, BYTES);
        stage.ledger.advances().await;
        assert_eq!(standby.point().number(), number);
        stage.proxy.both(true);
        let copying = wait_for(&mut news, "copying", |event| matches!(event, MoveEvent::Copying { .. })).await.pop();
        let Some(MoveEvent::Copying { owed_bytes, .. }) = copying else { unreachable!("it was waited for") };
        assert!(owed_bytes < 1024 * 4096, "{owed_bytes} bytes were owed when it came back: it began anew");
        check_points(&standby, &mut told, 3).await;
        assert!(standby.point().number() > number);
    }
    let moved = soon("the promotion", standby.promote()).await.unwrap();
    check_noise(&moved.regions()[2]);
    stage.has_moved(&moved).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_comes_back_is_told_that_it_must_not_run() {
    if !userfaultfd() {
        return;
    }
    let stage = Stage::new(Weather::default(), 0);
    let standby = stage.stand_by().await;
    let (mut told, mut news) = (standby.events(), stage.source.events());
    check_points(&standby, &mut told, 2).await;
    stage.proxy.both(false);
    let moved = soon("taking over", standby.take_over()).await.unwrap();
    assert!(moved.epoch() > u64::from(u32::MAX), "{}", moved.epoch());
    goes_on(&moved).await;
    // It cannot know.
    stage.ledger.advances().await;
    assert!(stage.source.owns());
    stage.proxy.both(true);
    let epoch = moved.epoch();
    wait_for(&mut news, "the news", |event| *event == MoveEvent::Deposed { epoch }).await;
    stage.program.has_left();
    assert!(!stage.source.owns());
    assert!(matches!(soon("its end", stage.source.departed()).await, Err(MoveError::TakenOver { epoch: by }) if by == epoch));
    wait_for(&mut told, "the answer", |event| *event == MoveEvent::Deposed { epoch }).await;
    soon("completion", moved.complete()).await.unwrap();
    // Nobody gets the program from there any more.
    let destination = soon("connecting", stage.keys.destination(stage.proxy.address).connect()).await.unwrap();
    let error = soon("asking", destination.take(pageferry::Strategy::hybrid())).await.unwrap_err();
    assert!(matches!(error, MoveError::Aborted { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_within_reach_is_stopped_when_its_standby_takes_over() {
    if !userfaultfd() {
        return;
    }
    let stage = Stage::new(Weather::default(), 0);
    let standby = stage.stand_by().await;
    let moved = soon("taking over", standby.take_over()).await.unwrap();
    assert!(matches!(soon("its end", stage.source.departed()).await, Err(MoveError::TakenOver { .. })));
    stage.program.has_left();
    goes_on(&moved).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promotion_that_fails_leaves_the_program_there_and_the_standby_near() {
    if !userfaultfd() {
        return;
    }
    let stage = Stage::new(Weather::default(), 0);
    let standby = stage.stand_by().await;
    let (mut told, mut news) = (standby.events(), stage.source.events());
    let never_passes = stage.program.gate.enter();
    wait_for(&mut news, "a point that is missed", |event| matches!(event, MoveEvent::PointMissed { .. })).await;
    stage.ledger.advances().await;
    // No point, no promotion: what the program writes meanwhile is followed.
    let error = soon("the promotion", standby.promote()).await.unwrap_err();
    assert!(matches!(error, MoveError::Aborted { .. } | MoveError::Lost { .. }), "{error}");
    drop(never_passes);
    check_points(&standby, &mut told, 2).await;
    let moved = soon("the promotion", standby.promote()).await.unwrap();
    stage.has_moved(&moved).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_that_was_called_off_ends_and_its_last_point_stays() {
    if !userfaultfd() {
        return;
    }
    let stage = Stage::new(Weather::default(), 0);
    let standby = stage.stand_by().await;
    assert!(soon("the cancel", stage.source.cancel()).await);
    assert!(matches!(soon("its end", standby.ended()).await, MoveError::Aborted { .. }));
    check_point(&standby.point(), &NAMES, BYTES);
    assert!(matches!(soon("promoting", standby.promote()).await, Err(MoveError::Aborted { .. })));
    stage.ledger.advances().await;
    let moved = soon("taking over", standby.take_over()).await.unwrap();
    assert!(matches!(soon("its end", stage.source.departed()).await, Err(MoveError::TakenOver { .. })));
    stage.program.has_left();
    goes_on(&moved).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_that_is_dropped_leaves_the_program_to_others() {
    if !userfaultfd() {
        return;
    }
    let stage = Stage::new(Weather::default(), 0);
    let mut news = stage.source.events();
    drop(stage.stand_by().await);
    // It says so: nobody waits for it to come back.
    wait_for(&mut news, "the end of the attempt", |event| matches!(event, MoveEvent::Aborted { .. })).await;
    stage.ledger.advances().await;
    let standby = stage.stand_by().await;
    // One at a time.
    let error = soon("asking", stage.connect().await.stand_by(NEAR)).await.unwrap_err();
    assert!(matches!(error, MoveError::Aborted { .. }), "{error}");
    let moved = soon("the promotion", standby.promote()).await.unwrap();
    stage.has_moved(&moved).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_that_is_held_runs_on_when_its_standby_does_not_answer() {
    if !userfaultfd() {
        return;
    }
    let stage = Stage::new(Weather::default(), 0);
    let mut news = stage.source.events();
    let options = StandbyOptions { hold: true, ..NEAR };
    let standby = soon("the first point", stage.connect().await.stand_by(options)).await.unwrap();
    let mut told = standby.events();
    check_points(&standby, &mut told, 2).await;
    stage.proxy.both(false);
    wait_for(&mut news, "the end of the attempt", program::is_aborted).await;
    stage.ledger.advances().await;
    stage.proxy.both(true);
    check_points(&standby, &mut told, 2).await;
    let moved = soon("the promotion", standby.promote()).await.unwrap();
    stage.has_moved(&moved).await;
}

/// A child: a source with its program.
#[test]
fn source_of_a_standby() {
    const ROLE: &str = "source_of_a_standby";
    let (Some(key), Some(peer)) = (told(ROLE, "KEY"), told(ROLE, "PEER")) else { return };
    live_with_parent();
    let identity = pageferry::Identity::load(key).unwrap();
    let (ledger, regions) = (Ledger::new(), world(&NAMES, PAGES));
    let program = Program::start(&regions, &ledger);
    let source = Source::builder(&identity).grant(peer.parse().unwrap(), &regions).gate(&program.gate);
    let source = source.state(move || state_of(&ledger)).transport(program::short_idle()).listen(LOOPBACK).unwrap();
    say(&source.local_addr().to_string());
    std::thread::park();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_goes_on_from_its_last_point_when_the_source_is_killed() {
    if !userfaultfd() {
        return;
    }
    let (keys, folder) = (Keys::new(), tempfile::tempdir().unwrap());
    let key = folder.path().join("key.pem");
    keys.here.save(&key).unwrap();
    let peer = keys.there.peer_id().to_string();
    for points in [0, 1, 5] {
        let child = Child::play("source_of_a_standby", &[("KEY", key.to_str().unwrap()), ("PEER", &peer)]);
        let address = child.says().parse().unwrap();
        let destination = soon("connecting", keys.destination(address).connect()).await.unwrap();
        let standby = soon("the first point", destination.stand_by(NEAR)).await.unwrap();
        let mut told = standby.events();
        check_points(&standby, &mut told, points).await;
        child.kill();
        let moved = soon("taking over", standby.take_over()).await.unwrap();
        until("the point is gone", || standby.point().number() == 0).await;
        goes_on(&moved).await;
        assert!(matches!(standby.take_over().await, Err(MoveError::Closed)));
    }
}
