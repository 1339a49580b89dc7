//! Lets requests wait a moment for company.
//!
//! Role: between hops *decide* and *request* when many threads fault at once. Neighbours: `engine` hands it the requests of new faults; `requests` tells it of answers. Invariants: a fault that
//! comes while no other is in flight never waits; none waits longer than [`COMPANY`]; requests keep their order.
//!
//! Why: a datagram costs both ends about as much as the page in it. Eight threads that fault one by one cost eight datagrams each way; gathered, they cost one or
//! two, and two cores answer about twice as many faults (bench `fault_latency`, `quic8_pages_s`). It is Nagle's rule (RFC 896) with a bound that no path notices.

use super::{core::Origin, engine::Engine, requests::Ask};
use std::{
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tokio::sync::Notify;

/// The longest wait: half of what a fault over loopback takes, 1 % of one over a network of 1.5 ms.
const COMPANY: Duration = Duration::from_micros(15);

/// See the module header.
#[derive(Default)]
pub(crate) struct Gather {
    /// Demand requests that are not answered.
    in_flight: AtomicUsize,
    waiting: Mutex<Vec<Ask>>,
    pub(super) more: Notify,
}

impl Gather {
    pub(super) fn sent(&self) {
        self.in_flight.fetch_add(1, Relaxed);
    }

    fn take(&self) -> Vec<Ask> {
        std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn is_empty(&self) -> bool {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }
}

impl Engine {
    /// Makes the requests of faults that were read together: at once if they are the only ones, else with those that come next.
    pub(super) fn request_or_gather(&self, asks: Vec<Ask>) {
        // Without polling there is nothing that could end so short a wait: the runtime's timers count milliseconds.
        if asks.is_empty() || self.gather.in_flight.load(Relaxed) == 0 || !self.service.polling().enabled() {
            return asks.into_iter().for_each(|ask| self.request(ask));
        }
        self.gather.waiting.lock().unwrap_or_else(PoisonError::into_inner).extend(asks);
        self.gather.more.notify_one();
    }

    /// A demand request is over. The last one in flight lets the gathered go.
    pub(super) fn demand_answered(&self) {
        if self.gather.in_flight.fetch_sub(1, Relaxed) == 1 {
            self.request_gathered();
        }
    }

    fn request_gathered(&self) {
        // Faults before their neighbours, whichever fault these belong to.
        let (demand, around): (Vec<Ask>, Vec<Ask>) = self.gather.take().into_iter().partition(|ask| ask.origin == Origin::Demand);
        demand.into_iter().chain(around).for_each(|ask| self.request(ask));
    }
}

/// Ends the wait of requests whose company does not come.
pub(super) async fn run(engine: Weak<Engine>, gather: Arc<Gather>) {
    loop {
        gather.more.notified().await;
        let start = Instant::now();
        while start.elapsed() < COMPANY && !gather.is_empty() {
            tokio::task::yield_now().await;
        }
        let Some(engine) = engine.upgrade() else { return };
        engine.request_gathered();
    }
}
