//! The load: threads that query the index without a break and count what they do.
//!
//! Role: the running program that is moved. Neighbours: `search` answers, `ledger` says which operation comes next and records it;
//! `source` and `destination` start it. Invariants: between two operations a worker passes its gate, and nowhere else can it be
//! held; at the gate everything of its past is in the region and its next operation's number in [`View::states`].

use crate::{
    index::{Index, IndexError, MAX_WORKERS},
    ledger::{Operation, Slot, WorkerState},
    search::search,
    timeline::{Clock, Timeline},
};
use hdrhistogram::Histogram;
use pageferry::Region;
use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::Acquire, Ordering::Release},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};
use thiserror::Error;

/// First bytes of a state, and its version.
const STATE_MAGIC: [u8; 4] = *b"pfs1";
const STATE_BYTES: usize = 16;
/// A longer operation counts as this long. A lost peer is given up much earlier.
const MAX_LATENCY_NS: u64 = 600_000_000_000;

/// The load could not start or ended by itself.
#[derive(Debug, Error)]
pub enum LoadError {
    #[error("{workers} workers asked for, allowed are 1 to {MAX_WORKERS}")]
    Workers { workers: usize },
    #[error("the program's state is damaged: {0}")]
    State(&'static str),
    #[error("worker {worker} stopped at operation {operation}: {source}")]
    Stopped { worker: usize, operation: u64, source: IndexError },
    #[error("worker {worker} panicked")]
    Panicked { worker: usize },
    #[error(transparent)]
    Index(#[from] IndexError),
    #[error("no thread for a worker: {0}")]
    Thread(#[from] io::Error),
}

/// New workers. Seeds differ by more than their low bits.
pub fn new_states(workers: usize, seed: u64) -> Vec<WorkerState> {
    (0..workers as u64).map(|worker| WorkerState { seed: crate::word::mix(seed ^ worker << 32), next_operation: 0 }).collect()
}

/// The program's state as it moves: `pfs1`, then 8 bytes of seed and 8 of next operation for each worker, little-endian.
pub fn encode(states: &[WorkerState]) -> Vec<u8> {
    let numbers = states.iter().flat_map(|state| [state.seed, state.next_operation]);
    STATE_MAGIC.into_iter().chain(numbers.flat_map(u64::to_le_bytes)).collect()
}

/// The reverse of [`encode`].
///
/// # Errors
/// [`LoadError::State`], [`LoadError::Workers`].
pub fn decode(bytes: &[u8]) -> Result<Vec<WorkerState>, LoadError> {
    let Some(states) = bytes.strip_prefix(&STATE_MAGIC) else { return Err(LoadError::State("it does not start with pfs1")) };
    let (numbers, []) = states.as_chunks::<8>() else { return Err(LoadError::State("its length is odd")) };
    if !states.len().is_multiple_of(STATE_BYTES) {
        return Err(LoadError::State("a worker without its operation"));
    }
    let number = |bytes: [u8; 8]| u64::from_le_bytes(bytes);
    let states: Vec<WorkerState> =
        numbers.chunks_exact(2).map(|pair| WorkerState { seed: number(pair[0]), next_operation: number(pair[1]) }).collect();
    allowed(&states)?;
    Ok(states)
}

fn allowed(states: &[WorkerState]) -> Result<(), LoadError> {
    let workers = states.len();
    if (1..=MAX_WORKERS).contains(&workers) { Ok(()) } else { Err(LoadError::Workers { workers }) }
}

/// How a stretch of the load went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Phase {
    pub duration: Duration,
    pub operations: u64,
    /// From the end of the operation before, the gate included: what somebody who asks without a break waits.
    pub p50: Duration,
    pub p99: Duration,
    pub max: Duration,
}

impl Phase {
    pub fn per_second(&self) -> f64 {
        #[allow(clippy::cast_precision_loss, reason = "a rate to be read")]
        let operations = self.operations as f64;
        if self.duration.is_zero() { 0.0 } else { operations / self.duration.as_secs_f64() }
    }
}

/// What the load of one process came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observed {
    pub states: Vec<WorkerState>,
    /// One more than there were marks.
    pub phases: Vec<Phase>,
    pub timeline: Timeline,
    /// End of the first and of the last operation, from the clock's epoch; `None` without any.
    pub answered: Option<(Duration, Duration)>,
}

/// A running load. Its workers end when their gates say so, and stay at their gates until then.
pub struct Load {
    workers: Vec<JoinHandle<Result<Seen, LoadError>>>,
    shared: Arc<Shared>,
}

struct Shared {
    clock: Clock,
    seeds: Vec<u64>,
    next: Vec<Progress>,
    phase: AtomicUsize,
    /// When each phase began.
    begun: Mutex<Vec<Duration>>,
}

/// A cache line of its own, or the workers would slow each other down.
#[derive(Default)]
#[repr(align(64))]
struct Progress(AtomicU64);

/// What one worker saw.
struct Seen {
    latency_ns: Vec<Histogram<u64>>,
    timeline: Timeline,
    answered: Option<(Duration, Duration)>,
}

impl Shared {
    fn states(&self) -> Vec<WorkerState> {
        let next = self.next.iter().map(|next| next.0.load(Acquire));
        self.seeds.iter().zip(next).map(|(&seed, next_operation)| WorkerState { seed, next_operation }).collect()
    }
}

/// See [`Load::view`].
#[derive(Clone)]
pub struct View(Arc<Shared>);

impl View {
    /// The state of each worker. Exact while all are at their gates, or have ended.
    pub fn states(&self) -> Vec<WorkerState> {
        self.0.states()
    }

    /// Operations done so far, those before a move included.
    pub fn operations(&self) -> u64 {
        self.states().iter().map(|state| state.next_operation).sum()
    }
}

impl Load {
    /// Starts a thread for each state. `gate_of` makes each worker's gate, which is called before every operation: it may block,
    /// and ends the worker with `false`.
    ///
    /// # Errors
    /// [`LoadError::Workers`], [`LoadError::Index`], [`LoadError::Thread`]: then the workers that have started end by their gates.
    pub fn start<G>(
        region: &Region,
        states: &[WorkerState],
        clock: Clock,
        mut gate_of: impl FnMut(usize) -> G,
    ) -> Result<Load, LoadError>
    where
        G: FnMut() -> bool + Send + 'static,
    {
        allowed(states)?;
        let index = Index::attach(region)?;
        let shared = Arc::new(Shared {
            clock,
            seeds: states.iter().map(|state| state.seed).collect(),
            next: states.iter().map(|state| Progress(state.next_operation.into())).collect(),
            phase: AtomicUsize::new(0),
            begun: Mutex::new(vec![clock.now()]),
        });
        let mut load = Load { workers: Vec::with_capacity(states.len()), shared };
        for (worker, state) in states.iter().enumerate() {
            Slot::of(&index, worker)?.claim(*state);
            let (region, shared, state, gate) = (region.clone(), Arc::clone(&load.shared), *state, gate_of(worker));
            let thread = thread::Builder::new().name(format!("worker {worker}"));
            load.workers.push(thread.spawn(move || work(&region, &shared, worker, state, gate))?);
        }
        Ok(load)
    }

    /// Looks on while it runs, and afterwards.
    pub fn view(&self) -> View {
        View(Arc::clone(&self.shared))
    }

    /// Ends a phase and begins the next.
    pub fn mark(&self) {
        let mut begun = self.shared.begun.lock().unwrap_or_else(PoisonError::into_inner);
        begun.push(self.shared.clock.now());
        self.shared.phase.fetch_add(1, Release);
    }

    /// Waits for the workers, whose gates must end them.
    ///
    /// # Errors
    /// What stopped a worker, if it was not its gate.
    pub fn join(self) -> Result<Observed, LoadError> {
        let Load { workers, shared } = self;
        let mut timeline = Timeline::default();
        let mut latency_ns: Vec<Histogram<u64>> = Vec::new();
        let mut answered: Option<(Duration, Duration)> = None;
        for (worker, thread) in workers.into_iter().enumerate() {
            let seen = thread.join().map_err(|_| LoadError::Panicked { worker })??;
            timeline.merge(&seen.timeline);
            for (phase, latency) in seen.latency_ns.into_iter().enumerate() {
                match latency_ns.get_mut(phase) {
                    // Equal bounds: adding cannot fail.
                    Some(sum) => sum.add(latency).unwrap_or_default(),
                    None => latency_ns.push(latency),
                }
            }
            answered = match (answered, seen.answered) {
                (Some((a, b)), Some((c, d))) => Some((a.min(c), b.max(d))),
                (one, other) => one.or(other),
            };
        }
        let begun = shared.begun.lock().unwrap_or_else(PoisonError::into_inner);
        let end = answered.map_or(Duration::ZERO, |(_, last)| last);
        let ends = begun.iter().copied().skip(1).chain([end]);
        let durations = begun.iter().zip(ends).map(|(begin, end)| end.saturating_sub(*begin));
        let phases = durations.enumerate().map(|(phase, duration)| summarize(duration, latency_ns.get(phase))).collect();
        Ok(Observed { states: shared.states(), phases, timeline, answered })
    }
}

fn summarize(duration: Duration, latency_ns: Option<&Histogram<u64>>) -> Phase {
    let Some(latency_ns) = latency_ns else { return Phase { duration, ..Phase::default() } };
    let quantile = |q| Duration::from_nanos(latency_ns.value_at_quantile(q));
    let (operations, max) = (latency_ns.len(), Duration::from_nanos(latency_ns.max()));
    Phase { duration, operations, p50: quantile(0.5), p99: quantile(0.99), max }
}

fn work(
    region: &Region,
    shared: &Shared,
    worker: usize,
    state: WorkerState,
    mut gate: impl FnMut() -> bool,
) -> Result<Seen, LoadError> {
    let index = Index::attach(region)?;
    let slot = Slot::of(&index, worker)?;
    let mut seen = Seen { latency_ns: Vec::new(), timeline: Timeline::default(), answered: None };
    let mut number = state.next_operation;
    let mut before = Instant::now();
    while gate() {
        let operation = Operation::of(state.seed, number, index.ranked());
        let done = answer(&index, operation).and_then(|()| slot.record(&index, number, operation));
        done.map_err(|source| LoadError::Stopped { worker, operation: number, source })?;
        number += 1;
        shared.next[worker].0.store(number, Release);
        let now = Instant::now();
        seen.see(shared, now, now - before);
        before = now;
    }
    Ok(seen)
}

fn answer(index: &Index, operation: Operation) -> Result<(), IndexError> {
    let second = operation.second.map(|rank| index.at_rank(rank)).transpose()?;
    let answer = search(index, index.at_rank(operation.first)?, second)?;
    // The one consumer of the answers is the load itself; without this the compiler might not make them.
    std::hint::black_box(answer);
    Ok(())
}

impl Seen {
    fn see(&mut self, shared: &Shared, now: Instant, latency: Duration) {
        let at = shared.clock.at(now);
        self.timeline.count(at);
        self.answered = Some((self.answered.map_or(at, |(first, _)| first), at));
        let phase = shared.phase.load(Acquire);
        while self.latency_ns.len() <= phase {
            // Three digits from 1 ns to the bound are within what the histogram allows.
            match Histogram::new_with_max(MAX_LATENCY_NS, 3) {
                Ok(latency_ns) => self.latency_ns.push(latency_ns),
                Err(_) => return,
            }
        }
        let latency_ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.latency_ns[phase].saturating_record(latency_ns);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{build::Builder, ledger::verify};
    use std::sync::mpsc;

    fn region() -> Region {
        let region = Region::builder().size(1 << 20).open().unwrap();
        let mut builder = Builder::new(&region).unwrap();
        for document in 0..20 {
            let text: String = (0..40).filter(|n| (document + n) % 5 == 0).map(|n| format!("word{n} ")).collect();
            builder.add("p", 0, text.as_bytes()).unwrap();
        }
        builder.finish().unwrap();
        region
    }

    /// A gate that opens `operations` times.
    fn open_for(operations: u64) -> impl FnMut() -> bool + Send + 'static {
        let mut left = operations;
        move || {
            left = left.saturating_sub(1);
            left > 0
        }
    }

    #[test]
    fn a_state_comes_back_and_a_damaged_one_does_not() {
        let states = new_states(3, 42);
        let bytes = encode(&states);
        assert_eq!(bytes.len(), 4 + 3 * STATE_BYTES);
        assert_eq!(decode(&bytes).unwrap(), states);
        for damaged in [&bytes[..bytes.len() - 1], &bytes[..bytes.len() - 8], &bytes[1..], &bytes[..4], b""] {
            assert!(decode(damaged).is_err());
        }
        assert!(matches!(decode(&encode(&new_states(MAX_WORKERS + 1, 0))), Err(LoadError::Workers { .. })));
    }

    #[test]
    fn a_load_that_goes_on_elsewhere_counts_as_one() {
        let (region, clock) = (region(), Clock::starting_now());
        let first = Load::start(&region, &new_states(3, 1), clock, |_| open_for(101)).unwrap().join().unwrap();
        assert_eq!(first.states.iter().map(|state| state.next_operation).collect::<Vec<_>>(), [100; 3]);
        let moved = decode(&encode(&first.states)).unwrap();
        let second = Load::start(&region, &moved, clock, |worker| open_for(11 * (1 + worker as u64))).unwrap().join().unwrap();
        let totals = verify(&Index::attach(&region).unwrap(), &second.states).unwrap();
        assert_eq!(totals.operations, 300 + 10 + 21 + 32);
        assert_eq!(second.timeline.slots.iter().sum::<u64>(), 63);
        assert!(first.answered.unwrap().1 <= second.answered.unwrap().0);
    }

    #[test]
    fn operations_count_in_the_phase_in_which_they_end() {
        let region = region();
        let (open, gate) = mpsc::channel();
        let mut gate = Some(gate);
        let (arrived, arrivals) = mpsc::channel();
        let gate_of = |_| {
            let (gate, arrived) = (gate.take().unwrap(), arrived.clone());
            move || arrived.send(()).is_ok() && gate.recv().is_ok()
        };
        let load = Load::start(&region, &new_states(1, 5), Clock::starting_now(), gate_of).unwrap();
        for operations in [1, 2] {
            (0..operations).for_each(|_| {
                arrivals.recv().unwrap();
                open.send(()).unwrap();
            });
            arrivals.recv().unwrap();
            // The worker is at its gate: the ledger adds up now.
            verify(&Index::attach(&region).unwrap(), &load.view().states()).unwrap();
            load.mark();
            arrived.send(()).unwrap();
        }
        drop(open);
        let phases = load.join().unwrap().phases;
        assert_eq!(phases.iter().map(|phase| phase.operations).collect::<Vec<_>>(), [1, 2, 0]);
        assert!(phases[0].p50 <= phases[0].p99 && phases[0].p99 <= phases[0].max);
    }

    #[test]
    fn a_worker_that_meets_a_damaged_index_says_so() {
        let region = region();
        let index = Index::attach(&region).unwrap();
        region.write_at(index.header().heap_start * 8, &vec![0; 1 << 16]).unwrap();
        let load = Load::start(&region, &new_states(1, 0), Clock::starting_now(), |_| || true).unwrap();
        assert!(matches!(load.join(), Err(LoadError::Stopped { worker: 0, operation: 0, .. })));
    }
}
