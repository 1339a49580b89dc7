//! Programs that move by each strategy, followed by each tracker, while they write: what is sent when, and that the destination has every write.

#[path = "common/net.rs"]
mod net;
#[path = "common/program.rs"]
mod program;

use net::{LOOPBACK, soon, userfaultfd};
use pageferry::{
    AtLimit, Destination, Gate, MoveError, MoveEvent, Moved, Pager, PagerOptions, Pass, Region, Source, Strategy, TrackerKind,
};
use program::{
    Keys, Ledger, Program, check, check_stamps, fill_with_noise, is_aborted, poison_soon, stamp_all, until, wait_for, world,
};
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

const PAGE: u64 = 4096;

async fn connect(source: &Source, keys: &Keys) -> Destination {
    soon("connecting", keys.destination(source.local_addr()).connect()).await.unwrap()
}

async fn take(destination: &Destination, strategy: Strategy) -> Result<Moved, MoveError> {
    soon("taking", destination.take(strategy)).await
}

/// Patient enough for programs that write all they have as fast as they can, on a machine that does other things.
fn pre_copy() -> Strategy {
    Strategy::pre_copy().downtime_limit(Duration::from_millis(1500))
}

fn strategies() -> [Strategy; 3] {
    [Strategy::post_copy(), pre_copy(), Strategy::hybrid()]
}

/// Pagers of the trackers that work beside others.
fn pagers() -> Vec<Pager> {
    let of = |kind| Pager::start(&PagerOptions { tracker: Some(kind), ..PagerOptions::default() }).unwrap();
    [TrackerKind::WpAsync, TrackerKind::WpSync].map(of).into()
}

fn regions_of(pager: &Pager, names: &[&str], pages: u64) -> Vec<Region> {
    let regions = names.iter().map(|name| Region::builder().name(*name).size(pages * PAGE).pager(pager).open().unwrap());
    regions.inspect(stamp_all).collect()
}

fn missing(moved: &Moved) -> u64 {
    moved.regions().iter().map(|region| region.residency().missing()).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_program_moves_by_every_strategy_and_loses_no_operation() {
    if !userfaultfd() {
        return;
    }
    for pager in pagers() {
        for strategy in strategies() {
            let (keys, ledger) = (Keys::new(), Ledger::new());
            let mut regions = regions_of(&pager, &["heap", "stack", "index"], 512);
            let here = Program::start(&regions, &ledger);
            regions.extend(regions_of(&pager, &["archive"], 64));
            let source = keys.source(&regions, &here.gate).listen(LOOPBACK).unwrap();
            ledger.advances().await;
            let destination = connect(&source, &keys).await;
            let mut told = destination.events();
            let moved = take(&destination, strategy).await.unwrap();
            here.has_left();
            let there = Program::start(&moved.regions()[..3], &ledger);
            ledger.advances().await;
            soon("the last page", moved.complete()).await.unwrap();
            let departed = soon("the departure", source.departed()).await.unwrap();
            assert_eq!(departed.rounds > 0, strategy != Strategy::post_copy(), "{departed:?}");
            // Pages with stamps weigh something, whoever asks for some of them first.
            assert!(departed.sent_bytes > 0, "{departed:?}");
            // From before there was anything to ask for events.
            assert!(matches!(told.recv().await, Ok(MoveEvent::Copying { .. } | MoveEvent::Resumed)));
            there.quit();
            check(&moved.regions()[..3], &ledger);
            check_stamps(&moved.regions()[3]);
            assert_eq!(missing(&moved), 0, "{strategy:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_fault_asks_for_leads_the_push() {
    if !userfaultfd() {
        return;
    }
    let (keys, gate) = (Keys::new(), Gate::new());
    let region = Region::builder().name("heap").size(8192 * PAGE).open().unwrap();
    fill_with_noise(&region);
    // All of it takes eight seconds.
    let builder = keys.source(std::slice::from_ref(&region), &gate).background_limit(4 << 20);
    let source = builder.listen(LOOPBACK).unwrap();
    let moved = take(&connect(&source, &keys).await, Strategy::post_copy()).await.unwrap();
    let there = moved.regions()[0].clone();
    let holds = |page: u64| there.resident_extents().iter().any(|extent| extent.contains(page));
    for touched in [6000, 3000] {
        let region = there.clone();
        tokio::task::spawn_blocking(move || region.read_at(touched * PAGE, &mut [0])).await.unwrap().unwrap();
        until("what lies behind it", || holds(touched + 500)).await;
        // What the push began with goes on when there is nothing behind what was touched.
        assert!(!holds(2000), "pages came in order");
    }
    drop((moved, there));
}

/// Writes, writes zeros and discards, at random, for as long as it may.
fn scribble(region: &Region, gate: &Gate, quit: &Arc<AtomicBool>, seed: u64) -> std::thread::JoinHandle<()> {
    let (region, place, quit) = (region.clone(), gate.enter(), quit.clone());
    std::thread::spawn(move || {
        let words = region.atomics_u64(0, region.len() / 8).unwrap();
        let mut random = seed | 1;
        while place.pass() == Pass::Run && !quit.load(Relaxed) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let page = random % region.extent().count();
            match random >> 32 & 15 {
                0 => region.discard(page * PAGE..(page + 1) * PAGE).unwrap(),
                1 => region.write_at(page * PAGE, &[0; PAGE as usize]).unwrap(),
                _ => words[(page * 512 + (random >> 40) % 512) as usize].store(random, Relaxed),
            }
        }
    })
}

/// The source's copy stays as it was when the program left it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_destination_has_what_the_source_had_when_it_paused() {
    if !userfaultfd() {
        return;
    }
    for (at, pager) in pagers().iter().enumerate() {
        for (round, strategy) in (1..).zip(strategies().into_iter().cycle().take(9)) {
            let (keys, gate, quit) = (Keys::new(), Gate::new(), Arc::default());
            let regions = regions_of(pager, &["heap"], 700);
            let threads = [1, 2].map(|thread| scribble(&regions[0], &gate, &quit, round * 31 + thread * 7 + at as u64));
            let source = keys.source(&regions, &gate).keep_memory().listen(LOOPBACK).unwrap();
            let moved = take(&connect(&source, &keys).await, strategy).await.unwrap();
            soon("the last page", moved.complete()).await.unwrap();
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            let [mut had, mut has] = [&regions[0], &moved.regions()[0]].map(|region| vec![0; region.len()]);
            regions[0].read_at(0, &mut had).unwrap();
            moved.regions()[0].read_at(0, &mut has).unwrap();
            let differs = had.chunks(PAGE as usize).zip(has.chunks(PAGE as usize)).position(|(had, has)| had != has);
            assert_eq!(differs, None, "a page differs after {strategy:?}");
            assert!(had.iter().any(|byte| *byte != 0));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_pre_copy_nothing_is_missing_and_the_source_may_go() {
    if !userfaultfd() {
        return;
    }
    let (keys, ledger, regions) = (Keys::new(), Ledger::new(), world(&["heap"], 2048));
    let here = Program::start(&regions, &ledger);
    let source = keys.source(&regions, &here.gate).listen(LOOPBACK).unwrap();
    ledger.advances().await;
    let destination = keys.destination(source.local_addr()).loss(poison_soon()).connect().await.unwrap();
    let moved = take(&destination, pre_copy()).await.unwrap();
    here.has_left();
    assert_eq!(missing(&moved), 0);
    drop(source);
    let there = Program::start(moved.regions(), &ledger);
    ledger.advances().await;
    soon("the last page", moved.complete()).await.unwrap();
    there.quit();
    check(moved.regions(), &ledger);
    assert_eq!(moved.regions()[0].stats().faults, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_hybrid_only_what_was_written_last_is_missing_and_comes_unasked() {
    if !userfaultfd() {
        return;
    }
    const PAGES: u64 = 8192;
    let (keys, gate, quit) = (Keys::new(), Gate::new(), Arc::new(AtomicBool::new(false)));
    let region = world(&["heap"], PAGES as usize).remove(0);
    let (hot, place) = (region.clone(), gate.enter());
    let writer = std::thread::spawn(move || {
        let words = hot.atomics_u64(0, hot.len() / 8).unwrap();
        let mut n = 0;
        while place.pass() == Pass::Run && !quit.load(Relaxed) {
            words[(n % 64 * 512) as usize].fetch_add(1, Relaxed);
            n += 1;
        }
        n
    });
    let source = keys.source(std::slice::from_ref(&region), &gate).keep_memory().listen(LOOPBACK).unwrap();
    let mut told = source.events();
    let moved = take(&connect(&source, &keys).await, Strategy::hybrid()).await.unwrap();
    let committed = wait_for(&mut told, "the commit", |event| matches!(event, MoveEvent::Committed { .. })).await;
    assert!(missing(&moved) <= 64, "{} pages are missing of 64 that were written", missing(&moved));
    soon("the last page", moved.complete()).await.unwrap();
    let n = writer.join().unwrap();
    let words = moved.regions()[0].atomics_u64(0, moved.regions()[0].len() / 8).unwrap();
    let counted: u64 = (0..64).map(|page| words[page * 512].load(Relaxed)).sum();
    assert_eq!(counted, n);
    let stats = moved.regions()[0].stats();
    assert!(stats.faults <= 64 && stats.pages_pull <= 64, "{stats:?}");
    let copying = committed.iter().filter_map(|event| match event {
        MoveEvent::Copying { round, .. } => Some(*round),
        _ => None,
    });
    assert!(copying.max() >= Some(1), "{committed:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_that_outruns_the_link_stays_unless_it_is_forced() {
    if !userfaultfd() {
        return;
    }
    let (keys, ledger, regions) = (Keys::new(), Ledger::new(), world(&["heap"], 512));
    let here = Program::start(&regions, &ledger);
    let source = keys.source(&regions, &here.gate).background_limit(8 << 20).listen(LOOPBACK).unwrap();
    let mut told = source.events();
    ledger.advances().await;
    let destination = connect(&source, &keys).await;
    let strategy = Strategy::pre_copy().downtime_limit(Duration::from_millis(1)).round_limit(2);
    let Err(MoveError::Aborted { reason }) = take(&destination, strategy).await else { panic!("it moved") };
    assert!(reason.contains("2 rounds") && reason.contains("1ms"), "{reason}");
    wait_for(&mut told, "the end of the attempt", is_aborted).await;
    assert!(source.owns());
    ledger.advances().await;
    let timed = Strategy::pre_copy().downtime_limit(Duration::ZERO).time_limit(Duration::from_millis(300));
    let Err(MoveError::Aborted { reason }) = take(&destination, timed).await else { panic!("it moved") };
    assert!(reason.contains("300ms"), "{reason}");
    ledger.advances().await;
    let moved = take(&destination, strategy.at_limit(AtLimit::Force)).await.unwrap();
    here.has_left();
    soon("the last page", moved.complete()).await.unwrap();
    check(moved.regions(), &ledger);
}

/// A program that writes as much as it is asked to, and no more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_that_slows_down_when_asked_can_be_copied() {
    if !userfaultfd() {
        return;
    }
    // At full speed it writes all of it in 100 ms, which takes longer to send than the pause may be, over any path.
    const PAGES: u64 = 8192;
    let (keys, gate, region) = (Keys::new(), Gate::new(), world(&["heap"], PAGES as usize).remove(0));
    let asked = Arc::new(Mutex::new(vec![1.0]));
    let (hot, place, speed) = (region.clone(), gate.enter(), asked.clone());
    let writer = std::thread::spawn(move || {
        let words = hot.atomics_u64(0, hot.len() / 8).unwrap();
        let mut n = 0;
        while place.pass() == Pass::Run {
            for _ in 0..PAGES / 100 {
                words[(n % PAGES * 512) as usize].fetch_add(1, Relaxed);
                n += 1;
            }
            let share = *speed.lock().unwrap().last().unwrap();
            std::thread::sleep(Duration::from_secs_f64(0.001 / share));
        }
        n
    });
    let noted = asked.clone();
    let builder = keys.source(std::slice::from_ref(&region), &gate).background_limit(64 << 20);
    let source = builder.throttle(move |share| noted.lock().unwrap().push(share)).listen(LOOPBACK).unwrap();
    // Or there would be nothing to carry.
    fill_with_noise(&region);
    let strategy = Strategy::pre_copy().downtime_limit(Duration::from_millis(8)).round_limit(200);
    let moved = take(&connect(&source, &keys).await, strategy).await.unwrap();
    let n = writer.join().unwrap();
    let there = moved.regions()[0].atomics_u64(0, moved.regions()[0].len() / 8).unwrap();
    let counted: u64 = (0..PAGES as usize).map(|page| there[page * 512].load(Relaxed)).sum();
    assert_eq!(counted, n);
    soon("the last page", moved.complete()).await.unwrap();
    drop(source);
    let asked = asked.lock().unwrap().clone();
    assert!(asked.iter().any(|share| *share < 1.0) && asked.last() == Some(&1.0), "{asked:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_may_say_when_it_moves() {
    if !userfaultfd() {
        return;
    }
    let (keys, ledger, regions) = (Keys::new(), Ledger::new(), world(&["heap"], 512));
    let here = Program::start(&regions, &ledger);
    let source = keys.source(&regions, &here.gate).listen(LOOPBACK).unwrap();
    let mut told = source.events();
    assert!(!source.finalize());
    let destination = connect(&source, &keys).await;
    let until_told = Strategy::pre_copy().downtime_limit(Duration::ZERO).round_limit(u16::MAX);
    let taking = tokio::spawn(async move { take(&destination, until_told).await });
    for _ in 0..3 {
        wait_for(&mut told, "copying", |event| matches!(event, MoveEvent::Copying { .. })).await;
        ledger.advances().await;
        assert!(source.owns());
    }
    assert!(source.finalize());
    let moved = taking.await.unwrap().unwrap();
    here.has_left();
    soon("the last page", moved.complete()).await.unwrap();
    check(moved.regions(), &ledger);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_while_pages_are_copied_leaves_the_program_running_and_ready_to_move() {
    if !userfaultfd() {
        return;
    }
    let (keys, ledger, regions) = (Keys::new(), Ledger::new(), world(&["heap"], 512));
    let here = Program::start(&regions, &ledger);
    let source = keys.source(&regions, &here.gate).listen(LOOPBACK).unwrap();
    let mut told = source.events();
    let until_told = Strategy::pre_copy().downtime_limit(Duration::ZERO).round_limit(u16::MAX);
    for _ in 0..5 {
        let destination = connect(&source, &keys).await;
        let taking = tokio::spawn(async move { take(&destination, until_told).await });
        wait_for(&mut told, "copying", |event| matches!(event, MoveEvent::Copying { .. })).await;
        assert!(source.cancel().await);
        assert!(matches!(taking.await.unwrap(), Err(MoveError::Aborted { .. })));
        ledger.advances().await;
    }
    // A destination that leaves is no different.
    let destination = connect(&source, &keys).await;
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    let doomed = keys.destination(source.local_addr()).pager(&pager).connect().await.unwrap();
    let taking = tokio::spawn(async move { doomed.take(until_told).await });
    wait_for(&mut told, "copying", |event| matches!(event, MoveEvent::Copying { .. })).await;
    taking.abort();
    assert!(source.cancel().await);
    ledger.advances().await;
    let moved = take(&destination, Strategy::hybrid()).await.unwrap();
    here.has_left();
    soon("the last page", moved.complete()).await.unwrap();
    check(moved.regions(), &ledger);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn background_traffic_keeps_to_its_limit_and_faults_do_not_wait_for_it() {
    if !userfaultfd() {
        return;
    }
    const BYTES_S: u64 = 4 << 20;
    let (keys, regions) = (Keys::new(), world(&["heap"], 2048));
    // What travels is what is limited.
    fill_with_noise(&regions[0]);
    let gate = Gate::new();
    let source = keys.source(&regions, &gate).background_limit(BYTES_S).listen(LOOPBACK).unwrap();
    let moved = take(&connect(&source, &keys).await, Strategy::post_copy()).await.unwrap();
    let start = Instant::now();
    // Page 2047 goes last, after two seconds.
    let there = moved.regions()[0].atomics_u64(0, moved.regions()[0].len() / 8).unwrap();
    let _ = there[2047 * 512].load(Relaxed);
    assert!(missing(&moved) > 1024, "the fault waited for the push");
    soon("the last page", moved.complete()).await.unwrap();
    let least = Duration::from_secs_f64((2048 - 64) as f64 * PAGE as f64 / BYTES_S as f64 * 0.8);
    assert!(start.elapsed() >= least, "{:?}, not {least:?}", start.elapsed());
}
