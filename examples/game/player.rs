//! Plays the game: a tick every sixtieth of a second.
//!
//! Role: the program that moves, as a thread. Neighbours: `source` and `destination` start one each and look at it. Invariants: between two ticks, and never within one, the thread asks
//! whether it may go on; what others see of it (times, heat) is for showing only, and no part of the game.

use crate::{
    ticks::{Log, PERIOD, Part},
    world::{World, WorldError},
};
use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Instant,
};

/// A game that is being played.
pub struct Player {
    seen: Arc<Seen>,
    thread: JoinHandle<Result<World, WorldError>>,
}

/// What others see of it.
pub struct Seen {
    log: Mutex<Log>,
    part: AtomicUsize,
    /// Ticks that this player made.
    made: AtomicU64,
    /// For each page, which of those wrote it last, from 1; 0 for none.
    wrote: Vec<AtomicU32>,
}

impl Player {
    /// Plays for as long as `go_on` says so; it is asked before each tick.
    ///
    /// # Errors
    /// No thread could be had.
    pub fn start(world: World, log: Log, part: Part, mut go_on: impl FnMut() -> bool + Send + 'static) -> io::Result<Player> {
        let pages = usize::try_from(world.region().extent().count()).unwrap_or(0);
        let seen = Arc::new(Seen {
            log: Mutex::new(log),
            part: AtomicUsize::new(part as usize),
            made: AtomicU64::new(0),
            wrote: (0..pages).map(|_| AtomicU32::new(0)).collect(),
        });
        let shown = seen.clone();
        let play = move || {
            let mut due = shown.log().next_due();
            for number in 1.. {
                thread::sleep(due.saturating_duration_since(Instant::now()));
                if !go_on() {
                    break;
                }
                let begun = Instant::now();
                world.tick(|page| shown.wrote[page].store(number, Relaxed))?;
                let done = Instant::now();
                let mut log = shown.locked();
                log.record(shown.part(), due, begun, done);
                // A game does not make up for what it missed.
                due = done.max(due + PERIOD);
                log.due_next(due);
                shown.made.store(number.into(), Relaxed);
            }
            Ok(world)
        };
        Ok(Player { seen, thread: thread::Builder::new().name("game".into()).spawn(play)? })
    }

    pub fn seen(&self) -> Arc<Seen> {
        self.seen.clone()
    }

    /// Waits for its end, which `go_on` decides.
    ///
    /// # Errors
    /// What ended it before that.
    pub fn join(self) -> Result<World, WorldError> {
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Seen {
    /// A copy: who holds no lock can wait for none.
    pub fn log(&self) -> Log {
        self.locked().clone()
    }

    /// The ticks from now on belong to this part.
    pub fn now_in(&self, part: Part) {
        self.part.store(part as usize, Relaxed);
    }

    /// Ticks that this player made, of the game's.
    pub fn made(&self) -> u64 {
        self.made.load(Relaxed)
    }

    /// How many ticks ago each page was written, if it was.
    pub fn ages(&self) -> impl Iterator<Item = Option<u64>> {
        let made = self.made();
        let age = move |number: u32| (number > 0).then(|| made.saturating_sub(number.into()));
        self.wrote.iter().map(move |number| age(number.load(Relaxed)))
    }

    fn locked(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn part(&self) -> Part {
        crate::ticks::PARTS[self.part.load(Relaxed)]
    }
}
