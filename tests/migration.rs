//! Whole migrations between ends of one process, over loopback QUIC and real userfaultfd, in which nothing fails but what the program
//! itself does: what moves, in which order, and what each end is told.

#[path = "common/net.rs"]
mod net;
#[path = "common/program.rs"]
mod program;

use net::{HANG, LOOPBACK, soon, userfaultfd};
use pageferry::{
    Destination, Gate, Identity, LossPolicy, MoveError, MoveEvent, NetError, Pager, PagerOptions, PeerId, Region, RegionError,
    Source, Strategy,
};
use program::{Keys, Ledger, Program, check, check_stamps, gated, is_aborted, poison_soon, until, wait_for, world};
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

async fn connect(source: &Source, keys: &Keys) -> Destination {
    soon("connecting", keys.destination(source.local_addr()).connect()).await.unwrap()
}

async fn take(destination: &Destination) -> Result<pageferry::Moved, MoveError> {
    soon("taking", destination.take(Strategy::post_copy())).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_program_moves_and_loses_no_operation() {
    if !userfaultfd() {
        return;
    }
    let (keys, ledger) = (Keys::new(), Ledger::new());
    let mut regions = world(&["heap", "stack", "index"], 512);
    let here = Program::start(&regions, &ledger);
    // Nobody touches it, and its pages wait for the test: the migration is not complete before they come.
    let (archive, gate_of_archive) = gated("archive", 64);
    regions.push(archive);
    let source = keys.source(&regions, &here.gate).state(|| b"registers".to_vec()).listen(LOOPBACK).unwrap();
    let mut told_here = source.events();
    ledger.advances().await;
    assert!(source.owns());
    let destination = connect(&source, &keys).await;
    let moved = take(&destination).await.unwrap();
    let mut told_there = moved.events();
    assert!(!source.owns());
    here.has_left();
    assert_eq!((moved.state(), moved.epoch()), (&b"registers"[..], 2));
    let names: Vec<_> = moved.regions().iter().map(Region::name).collect();
    assert_eq!(names, ["heap", "stack", "index", "archive"]);
    assert!(moved.region("nothing").is_none());

    let there = Program::start(&moved.regions()[..3], &ledger);
    ledger.advances().await;
    assert!(!source.cancel().await && !source.owns(), "nothing calls off what is committed");
    gate_of_archive.open();
    soon("the last page", moved.complete()).await.unwrap();
    let departed = soon("the departure", source.departed()).await.unwrap();
    ledger.advances().await;
    there.quit();
    check(&moved.regions()[..3], &ledger);
    check_stamps(&moved.regions()[3]);
    assert!(moved.regions().iter().all(|region| region.residency().missing() == 0));

    assert_eq!((departed.epoch, departed.peer), (2, keys.there.peer_id()));
    assert!(departed.downtime > Duration::ZERO && departed.downtime < departed.total, "{departed:?}");
    let all_here = wait_for(&mut told_here, "RELEASED", |event| *event == MoveEvent::Released).await;
    let (offered, committed) = (MoveEvent::Offered { epoch: 2 }, MoveEvent::Committed { epoch: 2 });
    assert_eq!(all_here, [offered, MoveEvent::Paused, committed, MoveEvent::Resumed, MoveEvent::Complete, MoveEvent::Released]);
    let mut all_there = wait_for(&mut told_there, "RELEASED", |event| *event == MoveEvent::Released).await;
    all_there.retain(|event| match event {
        MoveEvent::Progress { resident_pages, pages } => {
            assert!(resident_pages <= pages && *pages == 3 * 512 + 64, "{event:?}");
            false
        }
        _ => true,
    });
    assert_eq!(all_there, [MoveEvent::Complete, MoveEvent::Released]);
    let given_back = |region: &Region| {
        region.atomics_u64(0, region.len() / 8).unwrap().iter().all(|word| word.load(std::sync::atomic::Ordering::Relaxed) == 0)
    };
    assert!(regions.iter().all(given_back), "the source's memory went back to the kernel");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_may_keep_its_copy() {
    if !userfaultfd() {
        return;
    }
    let (keys, ledger, regions) = (Keys::new(), Ledger::new(), world(&["heap"], 64));
    let here = Program::start(&regions, &ledger);
    let source = keys.source(&regions, &here.gate).keep_memory().listen(LOOPBACK).unwrap();
    ledger.advances().await;
    let moved = take(&connect(&source, &keys).await).await.unwrap();
    here.has_left();
    soon("the departure", source.departed()).await.unwrap();
    check(&regions, &ledger);
    check(moved.regions(), &ledger);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_of_up_to_64_mib_moves_and_a_longer_one_stays() {
    if !userfaultfd() {
        return;
    }
    let state = |len: usize| (0..len).map(|at| (at % 251) as u8).collect::<Vec<u8>>();
    for len in [0, (1 << 20) + 1, 64 << 20, (64 << 20) + 1] {
        let (keys, ledger, regions) = (Keys::new(), Ledger::new(), world(&["heap"], 4));
        let here = Program::start(&regions, &ledger);
        let bytes = Arc::new(Mutex::new(state(len)));
        let given = bytes.clone();
        let builder = keys.source(&regions, &here.gate).pause_limit(HANG);
        let source = builder.state(move || given.lock().unwrap().clone()).listen(LOOPBACK).unwrap();
        let destination = connect(&source, &keys).await;
        let mut moved = take(&destination).await;
        if len > 64 << 20 {
            let Err(MoveError::Aborted { reason }) = moved else { panic!("{moved:?}") };
            assert!(reason.contains("67108865") && reason.contains("67108864"), "{reason}");
            assert!(source.owns());
            ledger.advances().await;
            bytes.lock().unwrap().truncate(5);
            moved = take(&destination).await;
        }
        let moved = moved.unwrap();
        here.has_left();
        assert!(*moved.state() == **bytes.lock().unwrap(), "{len} bytes changed on the way");
        check(moved.regions(), &ledger);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thread_that_does_not_pass_the_gate_aborts_the_move_and_the_program_runs_on() {
    if !userfaultfd() {
        return;
    }
    let (keys, ledger, regions) = (Keys::new(), Ledger::new(), world(&["heap"], 64));
    let here = Program::start(&regions, &ledger);
    let busy = here.gate.enter();
    let source = keys.source(&regions, &here.gate).pause_limit(Duration::from_millis(200)).listen(LOOPBACK).unwrap();
    let mut told = source.events();
    let destination = connect(&source, &keys).await;
    let Err(MoveError::Aborted { reason }) = take(&destination).await else { panic!("nothing was paused") };
    assert!(reason.contains("1 of 4 threads did not pass the gate within 200ms"), "{reason}");
    let seen = wait_for(&mut told, "the abort", is_aborted).await;
    assert_eq!(seen[0], MoveEvent::Offered { epoch: 2 });
    assert!(seen.len() == 2 && source.owns(), "{seen:?}");
    ledger.advances().await;
    drop(busy);
    let moved = take(&destination).await.unwrap();
    here.has_left();
    assert_eq!(moved.epoch(), 3);
    check(moved.regions(), &ledger);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hooks_pause_once_an_attempt_and_resume_only_what_stays() {
    if !userfaultfd() {
        return;
    }
    let (keys, regions, gate) = (Keys::new(), world(&["heap"], 4), Gate::new());
    let calls = Arc::new(Mutex::new(Vec::new()));
    let call = |name: &'static str| {
        let calls = calls.clone();
        move || {
            calls.lock().unwrap().push(name);
            async {}
        }
    };
    gate.hooks(call("pause"), call("resume"));
    let fails = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let state = move || if fails.swap(false, std::sync::atomic::Ordering::SeqCst) { panic!("no state yet") } else { vec![1] };
    let source = keys.source(&regions, &gate).state(state).listen(LOOPBACK).unwrap();
    let mut told = source.events();
    let destination = connect(&source, &keys).await;
    let Err(MoveError::Aborted { reason }) = take(&destination).await else { panic!("there is no state") };
    assert!(reason.contains("state function panicked"), "{reason}");
    wait_for(&mut told, "the abort", is_aborted).await;
    assert_eq!(*calls.lock().unwrap(), ["pause", "resume"]);
    let moved = take(&destination).await.unwrap();
    assert_eq!(moved.state(), [1]);
    soon("the departure", source.departed()).await.unwrap();
    drop(source);
    assert_eq!(*calls.lock().unwrap(), ["pause", "resume", "pause"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn regions_of_one_name_are_refused() {
    let (keys, regions) = (Keys::new(), world(&["heap", "heap"], 4));
    let refused = keys.source(&regions, &Gate::new()).listen(LOOPBACK);
    assert!(matches!(refused, Err(NetError::InvalidOption { option: "regions", .. })), "{refused:?}");
    let twice = keys.source(&regions[..1], &Gate::new()).grant(keys.here.peer_id(), &regions[..1]);
    assert!(twice.listen(LOOPBACK).is_ok(), "one region may be granted to several peers");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_is_taken_fails_the_move_and_the_program_runs_on() {
    if !userfaultfd() {
        return;
    }
    const AT: usize = 0x2100_0000_0000;
    let (keys, ledger) = (Keys::new(), Ledger::new());
    let fixed = Region::builder().name("fixed").size(64 * 4096).at(AT).open().unwrap();
    program::stamp_all(&fixed);
    let regions = [world(&["heap"], 4).remove(0), fixed];
    let here = Program::start(&regions, &ledger);
    let source = keys.source(&regions, &here.gate).listen(LOOPBACK).unwrap();
    let mut told = source.events();
    let destination = connect(&source, &keys).await;
    // The source itself has it.
    let Err(MoveError::Region(RegionError::AddressTaken { address, .. })) = take(&destination).await else {
        panic!("two at one place")
    };
    assert_eq!(address, AT);
    let aborted = wait_for(&mut told, "the abort", is_aborted).await.pop();
    assert!(matches!(&aborted, Some(MoveEvent::Aborted { reason }) if reason.contains("0x210000000000")), "{aborted:?}");
    assert!(source.owns());
    ledger.advances().await;
    here.quit();
    check(&regions, &ledger);
}

/// An owner: the program's keys and, from the first move on, the source that it came from.
struct End {
    identity: Identity,
    pager: Pager,
    loss: LossPolicy,
}

impl End {
    fn new() -> End {
        End::with(LossPolicy::default())
    }

    fn with(loss: LossPolicy) -> End {
        End { identity: Identity::generate().unwrap(), pager: Pager::start(&PagerOptions::default()).unwrap(), loss }
    }

    fn id(&self) -> PeerId {
        self.identity.peer_id()
    }

    fn offer(&self, to: &End, epoch: u64, regions: &[Region], gate: &Gate) -> Source {
        let source = Source::builder(&self.identity).grant(to.id(), regions).gate(gate).epoch(epoch);
        source.listen(LOOPBACK).unwrap()
    }

    async fn take(&self, source: &Source, from: &End) -> pageferry::Moved {
        let trust = pageferry::Trust::ids([from.id()]);
        let destination =
            Destination::builder(source.local_addr(), trust, &self.identity).pager(&self.pager).loss(self.loss.clone());
        take(&destination.connect().await.unwrap()).await.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_moves_back_and_forth_fifty_times() {
    if !userfaultfd() {
        return;
    }
    let (ends, ledger) = ([End::new(), End::new()], Ledger::new());
    let (mut regions, mut epoch) = (world(&["heap", "stack"], 128), 1);
    let mut program = Program::start(&regions, &ledger);
    for round in 0..50 {
        let (from, to) = (&ends[round % 2], &ends[(round + 1) % 2]);
        let source = from.offer(to, epoch, &regions, &program.gate);
        ledger.advances().await;
        let moved = to.take(&source, from).await;
        program.has_left();
        program = Program::start(moved.regions(), &ledger);
        let departed = soon("the departure", source.departed()).await.unwrap();
        assert_eq!((moved.epoch(), departed.epoch), (epoch + 1, epoch + 1));
        (regions, epoch) = (moved.regions().to_vec(), moved.epoch());
    }
    program.quit();
    check(&regions, &ledger);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_moves_on_while_its_pages_still_come_from_the_first_host() {
    if !userfaultfd() {
        return;
    }
    let (a, b, c, ledger) = (End::new(), End::new(), End::new(), Ledger::new());
    let (archive, pages) = gated("archive", 2048);
    let heap = world(&["heap"], 64).remove(0);
    let program = Program::start(std::slice::from_ref(&heap), &ledger);
    let first = a.offer(&b, 1, &[heap, archive], &program.gate);
    let at_b = b.take(&first, &a).await;
    program.has_left();
    let program = Program::start(&at_b.regions()[..1], &ledger);
    ledger.advances().await;
    let second = b.offer(&c, at_b.epoch(), at_b.regions(), &program.gate);
    let at_c = c.take(&second, &b).await;
    program.has_left();
    assert_eq!(at_c.epoch(), 3);
    let program = Program::start(&at_c.regions()[..1], &ledger);
    // C's pages wait for B, and B's for A.
    assert!(at_c.regions()[1].residency().missing() > 0 && at_b.regions()[1].residency().missing() > 0);
    ledger.advances().await;
    pages.open();
    soon("the last page at C", at_c.complete()).await.unwrap();
    soon("the last page at B", at_b.complete()).await.unwrap();
    for (source, to) in [(&first, &b), (&second, &c)] {
        assert_eq!(soon("the departure", source.departed()).await.unwrap().peer, to.id());
    }
    ledger.advances().await;
    program.quit();
    check(&at_c.regions()[..1], &ledger);
    check_stamps(&at_c.regions()[1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_lost_on_the_way_through_a_host_are_refused_and_never_zero() {
    if !userfaultfd() {
        return;
    }
    let (a, b, c, ledger) = (End::new(), End::with(poison_soon()), End::with(poison_soon()), Ledger::new());
    let (archive, pages) = gated("archive", 256);
    let heap = world(&["heap"], 64).remove(0);
    let program = Program::start(std::slice::from_ref(&heap), &ledger);
    let first = a.offer(&b, 1, &[heap, archive], &program.gate);
    let at_b = b.take(&first, &a).await;
    program.has_left();
    until("all of the heap is at B", || at_b.regions()[0].residency().missing() == 0).await;
    let gate = Gate::new();
    let second = b.offer(&c, at_b.epoch(), at_b.regions(), &gate);
    let at_c = c.take(&second, &b).await;
    // A goes while it holds the only copy of the archive.
    drop(first);
    let lost = |outcome: &Result<(), MoveError>| matches!(outcome, Err(MoveError::Region(RegionError::Lost { .. })));
    let (outcome_b, outcome_c) = soon("the losses", async { (at_b.complete().await, at_c.complete().await) }).await;
    assert!(lost(&outcome_b) && lost(&outcome_c), "{outcome_b:?} {outcome_c:?}");
    for page in 0..256 {
        let mut bytes = [0; 8];
        let read = at_c.regions()[1].read_at(page * 4096, &mut bytes);
        assert!(matches!(read, Err(RegionError::Lost { .. })), "page {page}: {read:?} {bytes:?}");
    }
    check(&at_c.regions()[..1], &ledger);
    assert!(pages.reads().iter().all(|extent| extent.count() > 0) && !second.owns());
}
