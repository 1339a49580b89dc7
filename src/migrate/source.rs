//! The end that has the program: offers it, gives it up, serves its pages until the last has gone.
//!
//! Role: the owner's handle on a program that may leave. Neighbours: a [`Server`] serves the regions' pages and brings the streams on which the program is
//! asked for; each is an `attempt`. Invariants: S6; after the commit the regions stay as they are until the destination has all of them.

use super::{
    MoveError, MoveEvent,
    copy::Throttle,
    gate::Gate,
    handover::{SourceHandover, SourceState},
    shared::{Shared, StateOf, lock},
};
use crate::{
    Grant, Identity, NetError, PeerId, Region, RegionStore, Server, ServerBuilder, Service, TransportOptions,
    net::wire::{Name, OfferedRegion, OfferedRegions, WireError},
};
use std::{
    collections::HashSet,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::sync::{broadcast, watch};

/// A program that may move away.
///
/// ```no_run
/// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use pageferry::{Gate, Identity, Pass, Region, Source};
/// let identity = Identity::load("source.pem")?;
/// let region = Region::builder().name("world").size(1 << 30).open()?;
/// let gate = Gate::new();
/// let source = Source::builder(&identity)
///     .grant("5f2c8c0e6b1f4d3a9e7b5c1d2f3a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c".parse()?, [&region])
///     .gate(&gate)
///     .listen("0.0.0.0:4433".parse()?)?;
/// let thread = gate.enter();
/// std::thread::spawn(move || {
///     while thread.pass() == Pass::Run {
///         // world.tick(&region)
///     }
/// });
/// let departed = source.departed().await?; // the program runs elsewhere, and every page has arrived there
/// println!("paused for {:?}", departed.downtime);
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Source {
    shared: Arc<Shared>,
    server: Server,
}

/// How a program left.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Departed {
    /// Who has it now.
    pub peer: PeerId,
    /// Its number as the owner.
    pub epoch: u64,
    /// From the last thread parking to the destination's word that the program runs there: the pause that the program saw, and at most half a round trip more.
    /// Zero if that word was lost with its connection.
    pub downtime: Duration,
    /// From the destination's asking to its having every page.
    pub total: Duration,
    /// Rounds of copying before the program moved; the last of them may not have come to its end.
    pub rounds: u32,
    /// Bytes of pages that the source sent by itself, as they travelled: compressed, and nothing for pages of zeros. What faults asked for is not among them. Of the attempt that committed.
    pub sent_bytes: u64,
}

/// See [`Source::builder`].
pub struct SourceBuilder<'a> {
    identity: &'a Identity,
    server: ServerBuilder<'a>,
    regions: Vec<Region>,
    peers: HashSet<PeerId>,
    gate: Gate,
    state: StateOf,
    epoch: u64,
    pause_limit: Duration,
    offer_limit: Duration,
    background_limit: Option<u64>,
    throttle: Option<Throttle>,
    reconnect_limit: Duration,
    keep_memory: bool,
}

impl std::fmt::Debug for SourceBuilder<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SourceBuilder").field("regions", &self.regions).field("peers", &self.peers).finish_non_exhaustive()
    }
}

impl SourceBuilder<'_> {
    /// Lets `peer` take the program, whose memory is `regions`. They need names of 1 to 255 bytes that differ. Several peers may be granted; one takes it.
    #[must_use]
    pub fn grant<'r>(mut self, peer: PeerId, regions: impl IntoIterator<Item = &'r Region>) -> Self {
        self.peers.insert(peer);
        for region in regions {
            self.server = self.server.grant(peer, region.name(), RegionStore::new(region), Grant::Read);
            if !self.regions.iter().any(|known| known.as_ptr() == region.as_ptr()) {
                self.regions.push(region.clone());
            }
        }
        self
    }

    /// Where the program pauses. Default: a gate that nothing passes, for a program that is not running.
    #[must_use]
    pub fn gate(mut self, gate: &Gate) -> Self {
        self.gate = gate.clone();
        self
    }

    /// The program's small state, asked for while it is paused: what is not in the regions (registers, counters, open files by name). At most 64 MiB; it counts into the pause.
    /// Runs on a thread that serves nobody, so it may touch regions. Default: none.
    #[must_use]
    pub fn state(mut self, state: impl Fn() -> Vec<u8> + Send + Sync + 'static) -> Self {
        self.state = Arc::new(state);
        self
    }

    /// The number of this owner, for a program that moved here: [`Moved::epoch`](super::Moved::epoch). Default 1.
    #[must_use]
    pub fn epoch(mut self, epoch: u64) -> Self {
        self.epoch = epoch;
        self
    }

    /// The longest pause: from asking the program to park until the destination is ready. At its end the program runs on. Default 2 s: a handover takes
    /// one and a half round trips and the state.
    #[must_use]
    pub fn pause_limit(mut self, limit: Duration) -> Self {
        self.pause_limit = limit;
        self
    }

    /// The most bytes a second, as they are sent (compressed, and without pages of zeros), that pages take which no fault waits for, in copying and in pushing. What faults ask for, and what is sent while the program pauses, is not held back.
    /// Default: as many as the path carries.
    #[must_use]
    pub fn background_limit(mut self, bytes_s: u64) -> Self {
        self.background_limit = Some(bytes_s.max(1));
        self
    }

    /// Asks a program that outruns the link to slow down, so that pre-copy can come to its end: `throttle` is called with the share of its speed that it may go on at, 1.0 when it may do as it likes
    /// again, from the source's thread: it should only make a note, and the program sleep where it passes its gate. Each round that gains nothing halves it, down to a sixteenth. Default: the
    /// program is not asked.
    #[must_use]
    pub fn throttle(mut self, throttle: impl Fn(f64) + Send + Sync + 'static) -> Self {
        self.throttle = Some(Arc::new(throttle));
        self
    }

    /// For how long a destination whose connection broke before the program moved finds its pages where it left them: until then the program's writes are followed, and only what it lacks is sent
    /// when it comes back. Default 30 s.
    #[must_use]
    pub fn reconnect_limit(mut self, limit: Duration) -> Self {
        self.reconnect_limit = limit;
        self
    }

    /// Keeps the source's copy after the destination has everything, for whoever wants to look at it. Default: its memory goes back to the kernel, and reads as zeros.
    #[must_use]
    pub fn keep_memory(mut self) -> Self {
        self.keep_memory = true;
        self
    }

    /// Default [`TransportOptions::default`].
    #[must_use]
    pub fn transport(mut self, options: TransportOptions) -> Self {
        self.server = self.server.transport(options);
        self
    }

    /// Offers the program at `address` from then on. It runs on meanwhile.
    ///
    /// # Errors
    /// As for [`ServerBuilder::listen`], and [`NetError::InvalidOption`] for a region without a name or with that of another.
    pub fn listen(self, address: SocketAddr) -> Result<Source, NetError> {
        let invalid = |allowed| NetError::InvalidOption { option: "regions", value: format!("{:?}", self.regions), allowed };
        let mut names = HashSet::new();
        if !self.regions.iter().all(|region| names.insert(region.name())) {
            return Err(invalid("regions with names that differ, each granted to every peer".into()));
        }
        let offered = self.regions.iter().map(|region| {
            let address = region.fixed_address().map_or(0, |address| address as u64);
            Ok(OfferedRegion {
                name: Name::new(region.name())?,
                page_size: region.page_size(),
                size_bytes: region.size_bytes(),
                address,
            })
        });
        let offered = offered.collect::<Result<Vec<_>, WireError>>().and_then(OfferedRegions::new);
        let offered = offered.map_err(|error| invalid(error.to_string()))?;
        let service = Service::start("pageferry-source", crate::DEFAULT_POLL_BUDGET).map_err(|error| NetError::Socket {
            call: "starting a thread for",
            address,
            source: Arc::new(error),
        })?;
        let shared = Arc::new_cyclic(|me| Shared {
            me: me.clone(),
            handover: watch::Sender::new(SourceHandover::new(self.epoch)),
            pausing: Arc::default(),
            offered,
            regions: self.regions,
            peers: self.peers,
            gate: self.gate,
            state: self.state,
            pause_limit: self.pause_limit,
            offer_limit: self.offer_limit,
            background_limit: self.background_limit,
            throttle: self.throttle,
            feeds: watch::Sender::new(Vec::new()),
            finalize: watch::Sender::new(None),
            copying: Arc::default(),
            following: Arc::default(),
            parked: Mutex::default(),
            reconnect_limit: self.reconnect_limit,
            cancelled: Mutex::default(),
            keep_memory: self.keep_memory,
            service: service.clone(),
            events: broadcast::Sender::new(64),
            times: Mutex::default(),
            departed: watch::Sender::new(None),
        });
        let server = self.server.service(&service).extension(shared.clone()).listen(address)?;
        tracing::info!(id = %self.identity.peer_id(), address = %server.local_addr(), "the program may be taken");
        Ok(Source { shared, server })
    }
}

impl Source {
    /// Starts to describe a source with this key.
    #[must_use]
    pub fn builder(identity: &Identity) -> SourceBuilder<'_> {
        SourceBuilder {
            identity,
            server: Server::builder(identity),
            regions: Vec::new(),
            peers: HashSet::new(),
            gate: Gate::new(),
            state: Arc::new(Vec::new),
            epoch: 1,
            pause_limit: Duration::from_secs(2),
            offer_limit: Duration::from_secs(30),
            background_limit: None,
            throttle: None,
            reconnect_limit: Duration::from_secs(30),
            keep_memory: false,
        }
    }

    /// The address it is bound to.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.server.local_addr()
    }

    /// News from now on. A receiver that falls 64 events behind misses the oldest.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<MoveEvent> {
        self.shared.events.subscribe()
    }

    /// Whether the program still belongs to this end. Once false it never becomes true again.
    #[must_use]
    pub fn owns(&self) -> bool {
        !matches!(self.shared.state(), SourceState::Committed(_) | SourceState::Released(_) | SourceState::Deposed(_))
    }

    /// Calls off an attempt that has not committed: the program runs on here, and may be asked for again. Whether there was one. Of an interrupted one, no account is kept any longer.
    pub async fn cancel(&self) -> bool {
        drop(lock(&self.shared.parked).take());
        let Some(turn) = self.shared.state().turn() else { return false };
        *lock(&self.shared.cancelled) = Some(turn);
        let cancelled = self.shared.end(turn);
        if cancelled {
            // The attempt lets the program go before it lets go of this.
            drop(self.shared.pausing.lock().await);
            self.shared.tell(MoveEvent::Aborted { reason: "cancelled by the source".into() });
        }
        cancelled
    }

    /// Ends the copying of an attempt that is going on, whatever its strategy waits for: the program moves now, to a standby too. What is owed is sent within the pause if that fits the downtime limit of
    /// the strategy, and follows the program otherwise. Whether there was one that copies.
    pub fn finalize(&self) -> bool {
        match self.shared.state() {
            SourceState::Offered(turn) | SourceState::Copying(turn) => {
                self.shared.finalize.send_replace(Some(turn));
                true
            }
            _ => false,
        }
    }

    /// Returns when the program runs elsewhere and every page has arrived there. Until then this process must live.
    ///
    /// Cancellation: dropping the future changes nothing.
    ///
    /// # Errors
    /// [`MoveError::TakenOver`] if a standby took the program over without the source; [`MoveError::Closed`] if the source is shut down first.
    pub async fn departed(&self) -> Result<Departed, MoveError> {
        let mut departed = self.shared.departed.subscribe();
        let departed = departed.wait_for(Option::is_some).await.map_err(|_| MoveError::Closed)?;
        departed.clone().unwrap_or(Err(MoveError::Closed))
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        // Before the connections close: a READY that has come already would commit, and its destination could never be told so.
        let turn = self.shared.state().turn();
        if turn.is_some_and(|turn| self.shared.end(turn)) {
            self.shared.tell(MoveEvent::Aborted { reason: "the source was shut down".into() });
        }
    }
}
