//! Words: [`Service`], one OS thread of the crate with a private runtime.
//!
//! Role: everything that answers faults or peers runs on a service: the pager, QUIC endpoints, stores. Neighbours: `pager` and `net`
//! spawn on it; imports nothing above. Invariants: S2: no code on a service's thread touches a region, so a program may fault
//! from any thread of its own, a worker of its own runtime included; the thread ends when the last handle is dropped.

use std::{
    future::Future,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread::ThreadId,
    time::{Duration, Instant},
};
use tokio::{
    runtime::{Builder, Handle},
    sync::{Notify, oneshot},
    task::JoinHandle,
};

/// For how long a service polls for the next event instead of sleeping, while one is expected soon.
///
/// A sleeping thread takes about 11 us to wake on the machine of docs/benchmarks.md; polling replaces that by a system call of 0.4 us. It is used only
/// while an answer to a fault is outstanding (client) or right after a fault was answered (server), so the CPU cost is at
/// most this long a fault. The idea and the size of the default are those of KVM's halt polling (Documentation/virt/kvm/halt-polling.rst).
pub const DEFAULT_POLL_BUDGET: Duration = Duration::from_micros(200);

/// One OS thread of the crate with a private single-threaded runtime. Cheap to clone; the thread ends with the last clone.
///
/// ```
/// let service = pageferry::Service::start("example", pageferry::DEFAULT_POLL_BUDGET)?;
/// let answer = service.run(async { 6 * 7 });
/// assert_eq!(answer, Some(42));
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone)]
pub struct Service {
    inner: Arc<Inner>,
}

struct Inner {
    handle: Handle,
    polling: Arc<Polling>,
    thread: ThreadId,
    /// Dropped with the last handle, which ends the thread.
    _stop: oneshot::Sender<()>,
}

impl Service {
    /// Starts a thread called `name` (the kernel shows its first 15 bytes). `poll_budget` of zero switches polling off; so does a machine with one CPU.
    ///
    /// # Errors
    /// What the operating system answers when it has no thread or descriptor left.
    pub fn start(name: &str, poll_budget: Duration) -> io::Result<Service> {
        let runtime = Builder::new_current_thread().enable_all().thread_name(name).build()?;
        let handle = runtime.handle().clone();
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let polling = Arc::new(Polling::new(if cpus > 1 { poll_budget } else { Duration::ZERO }));
        let (stop, stopped) = oneshot::channel::<()>();
        let poller = polling.clone();
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            runtime.spawn(async move { poller.run().await });
            // Ends when the sender is dropped. Tasks left are dropped with the runtime, on this thread.
            let _ = runtime.block_on(stopped);
            runtime.shutdown_background();
        })?;
        let thread = thread.thread().id();
        Ok(Service { inner: Arc::new(Inner { handle, polling, thread, _stop: stop }) })
    }

    /// Runs a future on the thread; dropping the handle returned does not end it.
    pub(crate) fn spawn<F>(&self, future: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        self.inner.handle.spawn(future)
    }

    /// Runs a future on the thread and blocks the caller until it is done; `None` when the service ended first or when called on the
    /// service's own thread, where it would wait for itself.
    pub fn run<F>(&self, future: F) -> Option<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        if self.is_current() {
            return None;
        }
        let (answer, answered) = std::sync::mpsc::sync_channel(1);
        self.spawn(async move {
            let _ = answer.send(future.await);
        });
        answered.recv().ok()
    }

    /// Whether the caller runs on this service's thread.
    #[must_use]
    pub fn is_current(&self) -> bool {
        std::thread::current().id() == self.inner.thread
    }

    /// The runtime, for reactors that must register with it.
    pub(crate) fn handle(&self) -> &Handle {
        &self.inner.handle
    }

    /// Told by hops that expect the next event soon.
    pub(crate) fn polling(&self) -> &Arc<Polling> {
        &self.inner.polling
    }
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Service").field("thread", &self.inner.thread).finish_non_exhaustive()
    }
}

/// Keeps the thread awake for a bounded time.
pub(crate) struct Polling {
    budget: Duration,
    start: Instant,
    /// Nanoseconds after `start`.
    until_ns: AtomicU64,
    more: Notify,
}

impl Polling {
    fn new(budget: Duration) -> Polling {
        Polling { budget, start: Instant::now(), until_ns: AtomicU64::new(0), more: Notify::new() }
    }

    /// An event is expected within the budget: poll for it.
    pub(crate) fn expect(&self) {
        if self.budget.is_zero() {
            return;
        }
        let now_ns = self.now_ns();
        let budget_ns = u64::try_from(self.budget.as_nanos()).unwrap_or(u64::MAX);
        let was_ns = self.until_ns.swap(now_ns.saturating_add(budget_ns), Relaxed);
        if was_ns <= now_ns {
            self.more.notify_one();
        }
    }

    /// Nothing is expected any more.
    pub(crate) fn relax(&self) {
        self.until_ns.store(0, Relaxed);
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Each turn offers the core to threads that want it (more than the cores when many fault at once), lets every ready task run and then asks the
    /// kernel for events without waiting.
    async fn run(&self) {
        loop {
            self.more.notified().await;
            while self.now_ns() < self.until_ns.load(Relaxed) {
                std::thread::yield_now();
                tokio::task::yield_now().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_never_waits_for_itself() {
        let service = Service::start("test", Duration::ZERO).unwrap();
        let inner = service.clone();
        assert_eq!(service.run(async move { (inner.is_current(), inner.run(async { 1 })) }), Some((true, None)));
    }

    #[test]
    fn the_last_handle_may_be_dropped_on_the_thread_itself() {
        let service = Service::start("test", Duration::ZERO).unwrap();
        let (dropped, is_dropped) = std::sync::mpsc::channel();
        let last = service.clone();
        let (go, gone) = oneshot::channel::<()>();
        service.spawn(async move {
            let _ = gone.await;
            drop(last);
            let _ = dropped.send(());
        });
        drop(service);
        let _ = go.send(());
        assert!(is_dropped.recv_timeout(Duration::from_secs(10)).is_ok());
    }

    #[test]
    fn polling_ends_after_its_budget() {
        let polling = Polling::new(Duration::from_millis(2));
        let start = Instant::now();
        polling.expect();
        let runtime = Builder::new_current_thread().enable_time().build().unwrap();
        // `run` never ends by itself; it must leave the thread to the timer once the budget is used up.
        let outcome = runtime.block_on(async { tokio::time::timeout(Duration::from_millis(20), polling.run()).await });
        assert!(outcome.is_err() && start.elapsed() >= Duration::from_millis(20));
        assert!(polling.now_ns() > polling.until_ns.load(Relaxed));
    }
}
