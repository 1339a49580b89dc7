//! Moves whose connection breaks before the program has moved, or changes its path: they go on, and nothing is lost or sent again in vain.

#[path = "common/net.rs"]
mod net;
#[path = "common/program.rs"]
mod program;
#[path = "common/proxy.rs"]
mod proxy;

use net::{LOOPBACK, soon, userfaultfd};
use pageferry::{Destination, Gate, MoveError, MoveEvent, Moved, Pass, Region, Source, Strategy};
use program::{Keys, Ledger, Program, check, check_noise, fill_with_noise, is_aborted, wait_for, world};
use proxy::{Proxy, Weather};
use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};
use tokio::sync::broadcast::Receiver;

const PAGES: usize = 2048;
/// Copying all of it takes two seconds.
const BYTES_S: u64 = 4 << 20;

/// A program with memory that does not compress, and its source behind a proxy.
struct Stage {
    keys: Keys,
    ledger: Arc<Ledger>,
    program: Program,
    source: Source,
    proxy: Proxy,
}

impl Stage {
    fn new(reconnect_limit: Duration) -> Stage {
        let (keys, ledger, regions) = (Keys::new(), Ledger::new(), world(&["heap"], 64));
        let archive = Region::builder().name("archive").size((PAGES * 4096) as u64).open().unwrap();
        fill_with_noise(&archive);
        let program = Program::start(&regions, &ledger);
        let all = [regions[0].clone(), archive];
        let builder = keys.source(&all, &program.gate).background_limit(BYTES_S).reconnect_limit(reconnect_limit);
        let source = builder.listen(LOOPBACK).unwrap();
        let proxy = Proxy::in_weather(source.local_addr(), Weather::default(), 0);
        Stage { keys, ledger, program, source, proxy }
    }

    async fn connect(&self) -> Destination {
        let builder = self.keys.destination(self.proxy.address).decision_limit(Duration::from_secs(30));
        soon("connecting", builder.connect()).await.unwrap()
    }

    async fn has_moved(self, moved: &Moved) {
        self.program.has_left();
        let there = Program::start(&moved.regions()[..1], &self.ledger);
        self.ledger.advances().await;
        soon("the last page", moved.complete()).await.unwrap();
        soon("the departure", self.source.departed()).await.unwrap();
        there.quit();
        check(&moved.regions()[..1], &self.ledger);
        check_noise(&moved.regions()[1]);
    }
}

/// Of the next progress report.
async fn owed(told: &mut Receiver<MoveEvent>) -> u64 {
    let copying = wait_for(told, "copying", |event| matches!(event, MoveEvent::Copying { .. })).await.pop();
    let Some(MoveEvent::Copying { owed_bytes, .. }) = copying else { unreachable!("it was waited for") };
    owed_bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copying_goes_on_where_it_stopped_when_the_connection_comes_back() {
    if !userfaultfd() {
        return;
    }
    let moves = [Strategy::pre_copy().downtime_limit(Duration::from_millis(1500)), Strategy::hybrid()].map(|strategy| {
        tokio::spawn(async move {
            let stage = Stage::new(Duration::from_secs(30));
            let mut told = stage.source.events();
            let destination = stage.connect().await;
            let taking = tokio::spawn(async move { destination.take(strategy).await });
            let archive = (PAGES * 4096) as u64;
            while owed(&mut told).await > archive * 3 / 4 {}
            stage.proxy.both(false);
            wait_for(&mut told, "the loss", |event| matches!(event, MoveEvent::Interrupted { .. })).await;
            stage.ledger.advances().await;
            stage.proxy.both(true);
            wait_for(&mut told, "the next attempt", |event| *event == MoveEvent::Offered { epoch: 3 }).await;
            let left = owed(&mut told).await;
            assert!(left < archive, "{left} bytes were owed when it came back: it began anew");
            let moved = soon("the move", taking).await.unwrap().unwrap();
            assert_eq!(moved.epoch(), 3);
            stage.has_moved(&moved).await;
        })
    });
    for moved in moves {
        moved.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_path_that_changes_its_port_is_followed() {
    if !userfaultfd() {
        return;
    }
    for strategy in [Strategy::post_copy(), Strategy::hybrid()] {
        let stage = Stage::new(Duration::from_secs(30));
        let mut told = stage.source.events();
        let destination = stage.connect().await;
        let taking = tokio::spawn(async move { destination.take(strategy).await });
        if strategy == Strategy::hybrid() {
            owed(&mut told).await;
            stage.proxy.change_port();
            owed(&mut told).await;
        }
        let moved = soon("the move", taking).await.unwrap().unwrap();
        stage.proxy.change_port();
        assert_eq!(moved.epoch(), 2, "the connection was lost");
        stage.has_moved(&moved).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_that_does_not_come_back_leaves_the_program_to_others() {
    if !userfaultfd() {
        return;
    }
    for waits in [false, true] {
        let limit = if waits { Duration::from_millis(100) } else { Duration::from_secs(30) };
        let stage = Stage::new(limit);
        let mut told = stage.source.events();
        let builder = stage.keys.destination(stage.proxy.address).decision_limit(Duration::from_secs(1));
        let gone = builder.connect().await.unwrap();
        let taking = tokio::spawn(async move { gone.take(Strategy::hybrid()).await });
        owed(&mut told).await;
        stage.proxy.both(false);
        wait_for(&mut told, "the loss", is_aborted).await;
        assert!(matches!(soon("giving up", taking).await.unwrap(), Err(MoveError::Lost { .. })));
        if waits {
            tokio::time::sleep(limit * 2).await;
        }
        stage.ledger.advances().await;
        stage.proxy.both(true);
        let moved = soon("the move", stage.connect().await.take(Strategy::hybrid())).await.unwrap();
        stage.has_moved(&moved).await;
    }
}

/// A program of one thread that writes in one page, so that the pause is all that matters.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_breaks_in_the_pause_ends_the_pause() {
    if !userfaultfd() {
        return;
    }
    let (keys, gate) = (Keys::new(), Gate::new());
    let region = world(&["heap"], 64).remove(0);
    let (words, place) = (region.clone(), gate.enter());
    let thread = std::thread::spawn(move || {
        let words = words.atomics_u64(0, 8).unwrap();
        while place.pass() == Pass::Run {
            words[0].fetch_add(1, Relaxed);
        }
        words[0].load(Relaxed)
    });
    let source = keys.source(std::slice::from_ref(&region), &gate).listen(LOOPBACK).unwrap();
    let proxy = Arc::new(Proxy::start(source.local_addr()));
    let cut = proxy.clone();
    gate.hooks(
        move || {
            cut.both(false);
            async {}
        },
        || async {},
    );
    let mut told = source.events();
    let destination =
        soon("connecting", keys.destination(proxy.address).decision_limit(Duration::from_secs(30)).connect()).await.unwrap();
    let taking = tokio::spawn(async move { destination.take(Strategy::hybrid()).await });
    wait_for(&mut told, "the end of the attempt", is_aborted).await;
    let counter = region.atomics_u64(0, 1).unwrap();
    let before = counter[0].load(Relaxed);
    program::until("it runs", || counter[0].load(Relaxed) > before).await;
    gate.hooks(|| async {}, || async {});
    proxy.both(true);
    let moved = match soon("the move", taking).await.unwrap() {
        Ok(moved) => moved,
        Err(MoveError::Aborted { .. } | MoveError::Lost { .. }) => {
            soon("the next move", keys.destination(source.local_addr()).connect().await.unwrap().take(Strategy::hybrid()))
                .await
                .unwrap()
        }
        Err(error) => panic!("{error}"),
    };
    let counted = thread.join().unwrap();
    soon("the last page", moved.complete()).await.unwrap();
    assert_eq!(moved.regions()[0].atomics_u64(0, 1).unwrap()[0].load(Relaxed), counted);
}
