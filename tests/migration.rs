//! Whole migrations between two ends of one process, over loopback QUIC and real userfaultfd.

use pageferry::{Destination, Gate, Identity, MoveEvent, Pass, Region, Source, Strategy};
use std::sync::atomic::Ordering::Relaxed;

const SIZE: u64 = 8 << 20;

/// A program that counts operations in its region: word 0 counts them, and each writes its number to a word that it derives from it.
fn tick(region: &Region, words: usize) {
    let all = region.atomics_u64(0, words).unwrap();
    let n = all[0].fetch_add(1, Relaxed) + 1;
    all[1 + (n as usize * 7919) % (words - 1)].store(n, Relaxed);
}

fn check(region: &Region, words: usize) -> u64 {
    let all = region.atomics_u64(0, words).unwrap();
    let n = all[0].load(Relaxed);
    let mut expected = vec![0u64; words];
    (1..=n).for_each(|op| expected[1 + (op as usize * 7919) % (words - 1)] = op);
    for at in 1..words {
        assert_eq!(all[at].load(Relaxed), expected[at], "word {at} after {n} operations");
    }
    n
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_program_moves_and_loses_no_operation() {
    if !pageferry::Capabilities::probe().userfaultfd() {
        assert!(std::env::var_os("REQUIRE_UFFD").is_none(), "userfaultfd is needed");
        return eprintln!("SKIPPED: userfaultfd is not available");
    }
    let words = (SIZE / 8) as usize;
    let (here, there) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let region = Region::builder().name("world").size(SIZE).open().unwrap();
    let gate = Gate::new();
    let source = Source::builder(&here)
        .grant(there.peer_id(), [&region])
        .gate(&gate)
        .state(|| b"registers".to_vec())
        .listen("127.0.0.1:0".parse().unwrap())
        .unwrap();
    let thread = gate.enter();
    let program = std::thread::spawn({
        let region = region.clone();
        move || {
            while thread.pass() == Pass::Run {
                tick(&region, words);
            }
            region.atomics_u64(0, 1).unwrap()[0].load(Relaxed)
        }
    });
    let mut events = source.events();
    let destination = Destination::connect(source.local_addr(), here.peer_id(), &there).await.unwrap();
    let moved = destination.take(Strategy::post_copy()).await.unwrap();
    assert!(!source.owns());
    assert_eq!(moved.state(), b"registers");
    let operations_there = program.join().unwrap();
    let world = moved.region("world").unwrap();
    // Goes on here while pages arrive.
    let (world, n) = tokio::task::spawn_blocking(move || {
        for _ in 0..10_000 {
            tick(&world, words);
        }
        let n = check(&world, words);
        (world, n)
    })
    .await
    .unwrap();
    assert_eq!(n, operations_there + 10_000);
    moved.complete().await.unwrap();
    assert_eq!(world.residency().missing(), 0);
    let departed = source.departed().await.unwrap();
    assert_eq!((departed.epoch, departed.peer), (2, there.peer_id()));
    println!("{departed:?} {:?}", world.stats());
    let mut seen = Vec::new();
    while let Ok(event) = events.try_recv() {
        seen.push(event);
    }
    assert_eq!(seen[..2], [MoveEvent::Offered { epoch: 2 }, MoveEvent::Paused]);
    // The source's copy was given back.
    assert_eq!(region.atomics_u64(0, 1).unwrap()[0].load(Relaxed), 0);
}
