//! What S6 promises when the process of an end is killed (SIGKILL), at every step; and what holds in another process only: pointers into a region
//! of fixed address.
//!
//! Method: a test `child_..` is played by this binary once more, as the other process; run by itself it does nothing.

#[path = "common/net.rs"]
mod net;
#[path = "common/program.rs"]
mod program;
#[path = "common/raw.rs"]
mod raw;

use net::{HANG, LOOPBACK, soon, userfaultfd};
use pageferry::{
    Destination, Identity, LossPolicy, MemoryStore, MoveError, MoveEvent, Moved, OnLoss, PageSize, PeerId, Region, RegionError,
    Source, Strategy, Trust,
};
use program::{
    Child, Keys, Ledger, Program, check, check_stamps, gated, is_aborted, live_with_parent, poison_soon, say, short_idle,
    stamped_bytes, told, until, wait_for, world,
};
use raw::{COMMIT, MAPPED, OFFER, PREPARE, READY, RESUMED, RawDestination};
use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

async fn take(destination: &Destination) -> Result<Moved, MoveError> {
    soon("taking", destination.take(Strategy::post_copy())).await
}

async fn connect(keys: &Keys, address: SocketAddr, loss: LossPolicy) -> Destination {
    soon("connecting", keys.destination(address).loss(loss).connect()).await.unwrap()
}

/// A raw destination in a process of its own, to be killed at a step.
#[tokio::test]
async fn child_destination() {
    let Some(step) = told("child_destination", "STEP") else { return };
    live_with_parent();
    let variable = |name| told("child_destination", name).unwrap();
    let identity = Identity::from_pem(&variable("KEY")).unwrap();
    let raw = RawDestination::connect(variable("ADDRESS").parse().unwrap(), &identity).await;
    let mut handover = raw.take(variable("SESSION").parse().unwrap()).await;
    match step.as_str() {
        "TAKE" => {}
        "OFFER" => handover.up_to(OFFER).await,
        "MAPPED" => handover.up_to(MAPPED).await,
        "PREPARE" => handover.up_to(PREPARE).await,
        "READY" => handover.up_to(READY).await,
        "COMMIT" => handover.up_to(COMMIT).await,
        _ => {
            handover.up_to(RESUMED).await;
            drop(raw.read("heap", 3).await);
        }
    }
    say("there");
    std::future::pending().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_killed_at_any_step_leaves_one_owner() {
    if !userfaultfd() {
        return;
    }
    let steps = ["TAKE", "OFFER", "MAPPED", "PREPARE", "READY", "COMMIT", "PULL"];
    let played = steps.map(|step| tokio::spawn(kill_destination_at(step)));
    for step in played {
        step.await.unwrap();
    }
}

async fn kill_destination_at(step: &'static str) {
    let (keys, ledger, regions) = (Keys::new(), Ledger::new(), world(&["heap"], 256));
    let program = Program::start(&regions, &ledger);
    let source = keys.source(&regions, &program.gate).listen(LOOPBACK).unwrap();
    let mut events = source.events();
    let (key, address) = (keys.there.to_pem(), source.local_addr().to_string());
    let child = Child::play("child_destination", &[("STEP", step), ("KEY", &key), ("ADDRESS", &address), ("SESSION", "42")]);
    let there = tokio::task::spawn_blocking(move || {
        assert_eq!(child.says(), "there");
        child
    });
    let child = there.await.unwrap();
    // What it said last may still have been in its process.
    wait_for(&mut events, "the offer", |event| *event == MoveEvent::Offered { epoch: 2 }).await;
    child.kill();
    let decided = |event: &MoveEvent| is_aborted(event) || matches!(event, MoveEvent::Committed { .. });
    let decision = wait_for(&mut events, step, decided).await.pop().unwrap();
    assert!(
        matches!(step, "READY") || is_aborted(&decision) == matches!(step, "TAKE" | "OFFER" | "MAPPED" | "PREPARE"),
        "{step}: {decision:?}"
    );
    let destination = connect(&keys, source.local_addr(), poison_soon()).await;
    if is_aborted(&decision) {
        ledger.advances().await;
        let moved = take(&destination).await.unwrap();
        program.has_left();
        return check(moved.regions(), &ledger);
    }
    program.has_left();
    let refused = take(&destination).await;
    assert!(matches!(&refused, Err(MoveError::Aborted { .. })), "{step}: {refused:?}");
    let raw = RawDestination::connect(source.local_addr(), &keys.there).await;
    raw.take(42).await.expect(COMMIT).await;
    let served = raw.read("heap", 256).await;
    let mut here = vec![0; served.len()];
    regions[0].read_at(0, &mut here).unwrap();
    assert!(served == here && !source.owns(), "{step}: the memory is still served");
    check(&regions, &ledger);
}

/// A source in a process of its own: its archive's pages never come, and at the step named its program stands still.
#[tokio::test]
async fn child_source() {
    let Some(step) = told("child_source", "STEP") else { return };
    live_with_parent();
    let here = Identity::from_pem(&told("child_source", "KEY").unwrap()).unwrap();
    let peer: PeerId = told("child_source", "PEER").unwrap().parse().unwrap();
    let (archive, _closed) = gated("archive", 64);
    let regions = [world(&["heap"], 64).remove(0), archive];
    let program = Program::start(&regions[..1], &Ledger::new());
    let builder = Source::builder(&here).grant(peer, &regions).gate(&program.gate).transport(short_idle());
    let standing = |what: &'static str| {
        move || {
            say(what);
            std::thread::sleep(HANG);
        }
    };
    if step == "PAUSE" {
        let stand = standing("paused");
        program.gate.hooks(
            move || {
                let stand = stand;
                async move { tokio::task::spawn_blocking(stand).await.unwrap() }
            },
            || async {},
        );
    }
    let in_state = (step == "STATE").then(|| standing("in its state"));
    let builder = builder.pause_limit(HANG).state(move || {
        in_state.iter().for_each(|stand| stand());
        Vec::new()
    });
    let source = builder.listen(LOOPBACK).unwrap();
    say(&source.local_addr().to_string());
    let _ = source.departed().await;
}

fn source_process(keys: &Keys, step: &str) -> (Child, SocketAddr) {
    let peer = keys.there.peer_id().to_string();
    let child = Child::play("child_source", &[("STEP", step), ("KEY", &keys.here.to_pem()), ("PEER", &peer)]);
    let address = child.says().parse().unwrap();
    (child, address)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_killed_before_the_commit_is_an_error_in_time() {
    if !userfaultfd() {
        return;
    }
    for step in ["TAKE", "PAUSE", "STATE"] {
        let keys = Keys::new();
        let (child, address) = source_process(&keys, step);
        let destination = connect(&keys, address, poison_soon()).await;
        if step == "TAKE" {
            // It gets no further than receiving the TAKE.
            child.stop();
        }
        let taking = tokio::spawn(async move { take(&destination).await });
        if step != "TAKE" {
            drop(child.says());
        }
        child.kill();
        // By the idle time-out, and not by the longer limit of a step: `take` here gives up before that.
        let outcome = taking.await.unwrap();
        assert!(matches!(outcome, Err(MoveError::Lost { .. } | MoveError::Net(_))), "{step}: {outcome:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_killed_in_the_middle_of_the_pull_is_what_the_loss_policy_says() {
    if !userfaultfd() {
        return;
    }
    let spare = MemoryStore::from_bytes(stamped_bytes(64), PageSize::KIB_4);
    let fallback = LossPolicy { keep_trying: Duration::from_millis(500), then: OnLoss::Fallback(Arc::new(spare)) };
    for (loss, survives) in [(poison_soon(), false), (fallback, true)] {
        let keys = Keys::new();
        let (child, address) = source_process(&keys, "PULL");
        let moved = take(&connect(&keys, address, loss).await).await.unwrap();
        let (heap, archive) = (&moved.regions()[0], &moved.regions()[1]);
        until("the heap is here", || heap.residency().missing() == 0).await;
        // A thread that waits for a page of a source that dies gets its answer too.
        let waiting = tokio::spawn({
            let archive = archive.clone();
            async move { archive.populate(0..4096).await }
        });
        child.kill();
        let outcome = soon("the end of the pull", moved.complete()).await;
        let populated = soon("the page", waiting).await.unwrap();
        if survives {
            outcome.unwrap();
            populated.unwrap();
            check_stamps(archive);
        } else {
            assert!(matches!(outcome, Err(MoveError::Region(RegionError::Lost { .. }))), "{outcome:?}");
            assert!(matches!(populated, Err(RegionError::Lost { .. })), "{populated:?}");
            let read = archive.read_at(4096, &mut [0; 8]);
            assert!(matches!(read, Err(RegionError::Lost { .. })), "{read:?}");
        }
    }
}

const CHAIN_AT: usize = 0x2300_0000_0000;
const CHAIN_PAGES: usize = 64;

/// Takes a region with a chain of pointers and follows it by its addresses.
#[tokio::test]
async fn child_follower() {
    let Some(key) = told("child_follower", "KEY") else { return };
    live_with_parent();
    let address = told("child_follower", "ADDRESS").unwrap().parse().unwrap();
    let trust = Trust::ids([told("child_follower", "SOURCE").unwrap().parse().unwrap()]);
    let identity = Identity::from_pem(&key).unwrap();
    let destination = Destination::builder(address, trust, &identity).transport(short_idle()).connect().await.unwrap();
    let moved = destination.take(Strategy::post_copy()).await.unwrap();
    let (mut at, mut pages) = (CHAIN_AT, Vec::new());
    while at != 0 {
        pages.push((at - CHAIN_AT) / 4096);
        // SAFETY: the region is mapped at CHAIN_AT, every link is an aligned word inside it, and nobody writes it: its program is this test.
        at = unsafe { std::ptr::with_exposed_provenance::<usize>(at).read_volatile() };
    }
    moved.complete().await.unwrap();
    say(&format!("{pages:?}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pointers_into_a_region_of_fixed_address_hold_in_another_process() {
    if !userfaultfd() {
        return;
    }
    let (keys, ledger) = (Keys::new(), Ledger::new());
    let chain = Region::builder().name("chain").size((CHAIN_PAGES * 4096) as u64).at(CHAIN_AT).open().unwrap();
    // Through every page in an order that is not theirs; 25 and 64 have no common divisor.
    let order: Vec<usize> = (0..CHAIN_PAGES).map(|at| at * 25 % CHAIN_PAGES).collect();
    let words = chain.atomics_u64(0, CHAIN_PAGES * 512).unwrap();
    order.windows(2).for_each(|pair| words[pair[0] * 512].store((CHAIN_AT + pair[1] * 4096) as u64, Relaxed));
    let regions = [world(&["heap"], 4).remove(0), chain];
    let program = Program::start(&regions[..1], &ledger);
    let source = keys.source(&regions, &program.gate).listen(LOOPBACK).unwrap();
    // Here the address is taken: by the source itself. The next destination gets the program all the same.
    let taken = take(&connect(&keys, source.local_addr(), poison_soon()).await).await;
    assert!(matches!(taken, Err(MoveError::Region(RegionError::AddressTaken { address: CHAIN_AT, .. }))), "{taken:?}");
    ledger.advances().await;
    let (address, id) = (source.local_addr().to_string(), keys.here.peer_id().to_string());
    let child = Child::play("child_follower", &[("KEY", &keys.there.to_pem()), ("ADDRESS", &address), ("SOURCE", &id)]);
    let followed = tokio::task::spawn_blocking(move || (child.says(), child));
    assert_eq!(followed.await.unwrap().0, format!("{order:?}"));
    soon("the departure", source.departed()).await.unwrap();
    program.has_left();
}
