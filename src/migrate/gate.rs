//! Where a program can be paused.
//!
//! Role: the first step of a handover at the source. Neighbours: `source` pauses and resumes; the program's own threads pass it. Invariants: passing costs one
//! atomic load while nothing happens; once a pause is complete no thread that entered the gate runs until it is let go; a thread that was told to stop is
//! never told to run again.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};
use tokio::sync::Notify;

/// What a program's thread shall do after passing its gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a thread that runs on after `Stop` changes memory that another host owns"]
pub enum Pass {
    /// Go on.
    Run,
    /// The program runs elsewhere now: leave the loop, and touch its regions no more.
    Stop,
}

/// The pause point of a program: each of its threads [enters](Gate::enter) once and [passes](GateThread::pass) at every tick, between two changes of the program's memory that belong together. Cheap to clone.
///
/// ```
/// use pageferry::{Gate, Pass};
/// let gate = Gate::new();
/// let world = std::thread::spawn({
///     let thread = gate.enter();
///     move || {
///         let mut ticks = 0;
///         while thread.pass() == Pass::Run && ticks < 1000 {
///             ticks += 1; // world.tick(&region)
///         }
///         ticks
///     }
/// });
/// assert_eq!(world.join().unwrap(), 1000);
/// ```
#[derive(Clone, Default)]
pub struct Gate {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    /// RUN, PAUSE or STOP; changed under `threads`.
    signal: AtomicU8,
    threads: Mutex<Threads>,
    let_go: Condvar,
    parked: Notify,
    hooks: Mutex<Hooks>,
    /// Whether the pause hook was called, and the resume hook was not since; kept while one of them runs.
    hooked: tokio::sync::Mutex<bool>,
}

#[derive(Default)]
struct Threads {
    entered: usize,
    parked: usize,
    /// By [`Gate::pause`].
    paused: bool,
    /// How often by [`Gate::hold`].
    held: usize,
}

type Hook = Arc<dyn Fn() -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

#[derive(Default)]
struct Hooks {
    pause: Option<Hook>,
    resume: Option<Hook>,
}

const RUN: u8 = 0;
const PAUSE: u8 = 1;
const STOP: u8 = 2;

/// A pause was not complete in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{running} of {entered} threads did not pass the gate within {limit:?}: pass it at every tick, or raise the pause limit")]
pub struct PauseError {
    /// Threads that still ran.
    pub running: usize,
    /// All that had entered.
    pub entered: usize,
    /// How long they had.
    pub limit: Duration,
}

impl Gate {
    /// An open gate.
    #[must_use]
    pub fn new() -> Gate {
        Gate::default()
    }

    /// Hooks for a program that is paused by other means than its own threads passing here, such as a VM monitor with virtual CPUs: `pause` ends when nothing changes
    /// the memory any more, `resume` undoes it. They run on a service's thread: they must not touch a region nor block.
    pub fn hooks<P, R>(&self, pause: impl Fn() -> P + Send + Sync + 'static, resume: impl Fn() -> R + Send + Sync + 'static)
    where
        P: Future<Output = ()> + Send + 'static,
        R: Future<Output = ()> + Send + 'static,
    {
        let mut hooks = self.inner.hooks.lock().unwrap_or_else(PoisonError::into_inner);
        hooks.pause = Some(Arc::new(move || Box::pin(pause())));
        hooks.resume = Some(Arc::new(move || Box::pin(resume())));
    }

    /// Adds a thread that must pass before a pause is complete. It leaves when the value is dropped.
    #[must_use]
    pub fn enter(&self) -> GateThread {
        self.threads().entered += 1;
        GateThread { gate: self.clone() }
    }

    /// Whether the program was told to stop.
    #[must_use]
    pub fn stopped(&self) -> bool {
        self.inner.signal.load(Ordering::Acquire) == STOP
    }

    fn threads(&self) -> MutexGuard<'_, Threads> {
        self.inner.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks all threads to park and waits until they have, then runs the pause hook. On failure the program runs on. Dropping the future leaves the gate
    /// asking: call [`resume`](Gate::resume) then.
    ///
    /// # Errors
    /// [`PauseError`] after `limit`.
    pub async fn pause(&self, limit: Duration) -> Result<(), PauseError> {
        self.ask(|threads| threads.paused = true);
        let paused = self.all_parked(limit).await;
        if paused.is_err() {
            self.resume().await;
        }
        paused
    }

    /// Lets a paused program run on. A stopped one stays stopped.
    pub async fn resume(&self) {
        self.let_go(|threads| threads.paused = false).await;
    }

    /// As [`pause`](Gate::pause), beside whoever else pauses the program: it runs on when all have let it go, so that nobody lets a program run that another has paused to hand it over.
    pub(crate) async fn hold(&self, limit: Duration) -> Result<Hold, PauseError> {
        self.ask(|threads| threads.held += 1);
        let hold = Hold { gate: Some(self.clone()) };
        match self.all_parked(limit).await {
            Ok(()) => Ok(hold),
            Err(error) => {
                hold.let_go().await;
                Err(error)
            }
        }
    }

    async fn all_parked(&self, limit: Duration) -> Result<(), PauseError> {
        let all_parked = async {
            loop {
                let mut parked = std::pin::pin!(self.inner.parked.notified());
                parked.as_mut().enable();
                {
                    let threads = self.threads();
                    if threads.parked >= threads.entered {
                        break;
                    }
                }
                parked.await;
            }
            let mut hooked = self.inner.hooked.lock().await;
            let hook = self.inner.hooks.lock().unwrap_or_else(PoisonError::into_inner).pause.clone();
            if let Some(hook) = hook.filter(|_| !*hooked) {
                // Before it runs: what it had done when it was given up has to be undone.
                *hooked = true;
                hook().await;
            }
        };
        if tokio::time::timeout(limit, all_parked).await.is_ok() {
            return Ok(());
        }
        let threads = self.threads();
        let (entered, parked) = (threads.entered, threads.parked);
        Err(PauseError { running: entered.saturating_sub(parked), entered, limit })
    }

    /// Runs the resume hook if nobody else pauses the program, then lets its threads run if so.
    async fn let_go(&self, change: impl Fn(&mut Threads)) {
        let mut hooked = self.inner.hooked.lock().await;
        let last = {
            let threads = self.threads();
            let mut then = Threads { entered: 0, parked: 0, ..*threads };
            change(&mut then);
            then.runs()
        };
        let hook = self.inner.hooks.lock().unwrap_or_else(PoisonError::into_inner).resume.clone();
        if last
            && *hooked
            && self.inner.signal.load(Ordering::Acquire) == PAUSE
            && let Some(hook) = hook
        {
            hook().await;
            *hooked = false;
        }
        self.ask(change);
    }

    /// Lets the threads run at once, without the hook: for a place that cannot wait.
    pub(crate) fn run_on(&self) {
        self.ask(|threads| threads.paused = false);
    }

    /// Tells all threads to leave, for good: the program runs elsewhere, or shall end. [`Source`](super::Source) calls it when the program has moved.
    pub fn stop(&self) {
        let _threads = self.threads();
        self.inner.signal.store(STOP, Ordering::Release);
        self.inner.let_go.notify_all();
    }

    fn ask(&self, change: impl FnOnce(&mut Threads)) {
        let mut threads = self.threads();
        change(&mut threads);
        if self.inner.signal.load(Ordering::Acquire) != STOP {
            self.inner.signal.store(if threads.runs() { RUN } else { PAUSE }, Ordering::Release);
        }
        self.inner.let_go.notify_all();
    }
}

impl Threads {
    fn runs(&self) -> bool {
        !self.paused && self.held == 0
    }
}

/// A pause beside others. Dropping it lets the threads run without the hook, if nobody else holds them.
#[derive(Debug)]
pub(crate) struct Hold {
    gate: Option<Gate>,
}

impl Hold {
    pub(crate) async fn let_go(mut self) {
        if let Some(gate) = &self.gate {
            gate.let_go(|threads| threads.held -= 1).await;
        }
        self.gate = None;
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(gate) = &self.gate {
            gate.ask(|threads| threads.held -= 1);
        }
    }
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let threads = self.threads();
        write!(f, "Gate({} of {} threads parked)", threads.parked, threads.entered)
    }
}

/// One thread's place at a [`Gate`]. Stays with the thread that passes; dropping it says that the thread no longer changes the program's memory.
#[derive(Debug)]
pub struct GateThread {
    gate: Gate,
}

impl GateThread {
    /// Goes on at once while nothing happens (one atomic load). During a pause it blocks until the program goes on here or has moved away.
    #[inline]
    pub fn pass(&self) -> Pass {
        if self.gate.inner.signal.load(Ordering::Relaxed) == RUN { Pass::Run } else { self.park() }
    }

    #[cold]
    fn park(&self) -> Pass {
        let inner = &self.gate.inner;
        let mut threads = self.gate.threads();
        // Parking takes the lock that the pausing task takes: what this thread wrote is seen by whoever reads the memory after the pause.
        threads.parked += 1;
        inner.parked.notify_waiters();
        while inner.signal.load(Ordering::Acquire) == PAUSE {
            threads = inner.let_go.wait(threads).unwrap_or_else(PoisonError::into_inner);
        }
        threads.parked -= 1;
        if inner.signal.load(Ordering::Acquire) == STOP { Pass::Stop } else { Pass::Run }
    }
}

impl Drop for GateThread {
    fn drop(&mut self) {
        self.gate.threads().entered -= 1;
        self.gate.inner.parked.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    const LONG: Duration = Duration::from_secs(20);

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    /// Threads that count until told to stop.
    fn counters(gate: &Gate, count: usize) -> (Arc<AtomicU64>, Vec<std::thread::JoinHandle<()>>) {
        let total = Arc::new(AtomicU64::new(0));
        let threads = (0..count).map(|_| {
            let (thread, total) = (gate.enter(), total.clone());
            std::thread::spawn(move || {
                while thread.pass() == Pass::Run {
                    total.fetch_add(1, Ordering::Relaxed);
                    std::thread::yield_now();
                }
            })
        });
        let threads = threads.collect();
        (total, threads)
    }

    #[test]
    fn nothing_runs_between_a_complete_pause_and_the_resume() {
        let gate = Gate::new();
        let (total, threads) = counters(&gate, 4);
        let runtime = runtime();
        for _ in 0..200 {
            runtime.block_on(gate.pause(LONG)).unwrap();
            let before = total.load(Ordering::Relaxed);
            for _ in 0..20 {
                std::thread::yield_now();
            }
            assert_eq!(total.load(Ordering::Relaxed), before);
            runtime.block_on(gate.resume());
            while total.load(Ordering::Relaxed) == before {
                std::thread::yield_now();
            }
        }
        gate.stop();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }

    #[test]
    fn a_stopped_program_is_never_resumed() {
        let gate = Gate::new();
        let (_, threads) = counters(&gate, 2);
        let runtime = runtime();
        runtime.block_on(gate.pause(LONG)).unwrap();
        gate.stop();
        runtime.block_on(gate.resume());
        assert!(gate.stopped());
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }

    #[test]
    fn a_thread_that_does_not_pass_fails_the_pause_and_the_program_runs_on() {
        let gate = Gate::new();
        let (total, threads) = counters(&gate, 1);
        let never_passes = gate.enter();
        let error = runtime().block_on(gate.pause(Duration::from_millis(50))).unwrap_err();
        assert_eq!((error.running, error.entered), (1, 2));
        let before = total.load(Ordering::Relaxed);
        while total.load(Ordering::Relaxed) == before {
            std::thread::yield_now();
        }
        drop(never_passes);
        runtime().block_on(gate.pause(LONG)).unwrap();
        gate.stop();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }

    #[test]
    fn a_program_that_two_have_paused_runs_on_when_both_have_let_go() {
        let gate = Gate::new();
        let calls = Arc::new(Mutex::new(Vec::new()));
        let (pauses, resumes) = (calls.clone(), calls.clone());
        gate.hooks(
            move || {
                pauses.lock().unwrap().push("pause");
                async {}
            },
            move || {
                resumes.lock().unwrap().push("resume");
                async {}
            },
        );
        let (total, threads) = counters(&gate, 2);
        let runtime = runtime();
        for hold_first in [true, false] {
            let hold = runtime.block_on(gate.hold(LONG)).unwrap();
            runtime.block_on(gate.pause(LONG)).unwrap();
            let before = total.load(Ordering::Relaxed);
            let stands_still = || {
                for _ in 0..20 {
                    std::thread::yield_now();
                }
                assert_eq!(total.load(Ordering::Relaxed), before, "one let it run while the other had paused it");
            };
            if hold_first {
                runtime.block_on(hold.let_go());
                stands_still();
                runtime.block_on(gate.resume());
            } else {
                runtime.block_on(gate.resume());
                stands_still();
                runtime.block_on(hold.let_go());
            }
            while total.load(Ordering::Relaxed) == before {
                std::thread::yield_now();
            }
        }
        assert_eq!(*calls.lock().unwrap(), ["pause", "resume", "pause", "resume"]);
        gate.stop();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }

    #[test]
    fn hooks_run_once_a_pause_and_once_a_resume() {
        let gate = Gate::new();
        let calls = Arc::new(Mutex::new(Vec::new()));
        let (pauses, resumes) = (calls.clone(), calls.clone());
        gate.hooks(
            move || {
                pauses.lock().unwrap().push("pause");
                async {}
            },
            move || {
                resumes.lock().unwrap().push("resume");
                async {}
            },
        );
        let runtime = runtime();
        runtime.block_on(gate.pause(LONG)).unwrap();
        runtime.block_on(gate.resume());
        runtime.block_on(gate.resume());
        assert_eq!(*calls.lock().unwrap(), ["pause", "resume"]);
    }
}
