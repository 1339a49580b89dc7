//! The end that takes the program: maps its regions, becomes its owner, runs it while its pages come in.
//!
//! Role: what a host that takes a program holds, before and after. Neighbours: `taking` is one session of it. Invariants: S6: a program that was taken runs here and nowhere else.

use super::{
    MoveError, MoveEvent, Strategy,
    handover::SessionId,
    taking::{Means, Taking},
};
use crate::{FaultAround, Identity, LossPolicy, Pager, PagerOptions, Peer, PeerId, Region, TransportOptions, Trust};
use bytes::Bytes;
use std::{net::SocketAddr, time::Duration};
use tokio::sync::{broadcast, watch};

/// A host that can take a program.
///
/// ```no_run
/// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use pageferry::{Destination, Gate, Identity, Strategy};
/// let identity = Identity::load("destination.pem")?;
/// let source = "5f2c8c0e6b1f4d3a9e7b5c1d2f3a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c".parse()?;
/// let destination = Destination::connect("192.0.2.7:4433".parse()?, source, &identity).await?;
/// let moved = destination.take(Strategy::post_copy()).await?; // this host owns the program now
/// let (world, state) = (moved.region("world").expect("it was offered"), moved.state());
/// // run it: pages still arrive behind it
/// moved.complete().await?;
/// # let _ = (world, state);
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Destination {
    peer: Peer,
    pub(super) pager: Pager,
    loss: LossPolicy,
    fault_around: Option<FaultAround>,
    step_limit: Duration,
    pub(super) decision_limit: Duration,
    pub(super) events: broadcast::Sender<MoveEvent>,
}

/// See [`Destination::builder`].
#[derive(Debug)]
pub struct DestinationBuilder<'a> {
    address: SocketAddr,
    trust: Trust,
    identity: &'a Identity,
    pager: Option<Pager>,
    transport: TransportOptions,
    loss: LossPolicy,
    fault_around: Option<FaultAround>,
    decision_limit: Duration,
}

impl DestinationBuilder<'_> {
    /// The pager of the regions; the connection runs on its thread. Default: one of its own.
    #[must_use]
    pub fn pager(mut self, pager: &Pager) -> Self {
        self.pager = Some(pager.clone());
        self
    }

    /// Default [`TransportOptions::default`].
    #[must_use]
    pub fn transport(mut self, options: TransportOptions) -> Self {
        self.transport = options;
        self
    }

    /// What happens to threads that wait for pages if the source is lost before the last has come. Default [`LossPolicy::default`].
    #[must_use]
    pub fn loss(mut self, policy: LossPolicy) -> Self {
        self.loss = policy;
        self
    }

    /// What comes with a fault. Default: the pager's.
    #[must_use]
    pub fn fault_around(mut self, around: FaultAround) -> Self {
        self.fault_around = Some(around);
        self
    }

    /// For how long a lost connection is dialled again before the program runs here: while pages are copied, and when only the source knows whether the program changed hands.
    /// Default 30 s.
    #[must_use]
    pub fn decision_limit(mut self, limit: Duration) -> Self {
        self.decision_limit = limit;
        self
    }

    /// Connects to the source.
    ///
    /// # Errors
    /// [`MoveError::Net`]; [`MoveError::Region`] if this host may not use userfaultfd: better known before the program has left.
    pub async fn connect(self) -> Result<Destination, MoveError> {
        let pager = self.pager.map_or_else(|| Pager::start(&PagerOptions::default()), Ok)?;
        let peer = Peer::builder(self.address, self.trust, self.identity).transport(self.transport).service(pager.service());
        Ok(Destination {
            peer: peer.connect().await?,
            pager,
            loss: self.loss,
            fault_around: self.fault_around,
            step_limit: Duration::from_secs(30),
            decision_limit: self.decision_limit,
            events: broadcast::Sender::new(64),
        })
    }
}

impl Destination {
    /// Connects to the source whose key has the id `source`, with default options.
    ///
    /// # Errors
    /// As for [`DestinationBuilder::connect`].
    pub async fn connect(address: SocketAddr, source: PeerId, identity: &Identity) -> Result<Destination, MoveError> {
        Destination::builder(address, Trust::ids([source]), identity).connect().await
    }

    /// Starts to describe a connection to a source that `trust` accepts.
    #[must_use]
    pub fn builder(address: SocketAddr, trust: Trust, identity: &Identity) -> DestinationBuilder<'_> {
        DestinationBuilder {
            address,
            trust,
            identity,
            pager: None,
            transport: TransportOptions::default(),
            loss: LossPolicy::default(),
            fault_around: None,
            decision_limit: Duration::from_secs(30),
        }
    }

    /// The connection to the source, for its round trip and latencies.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// News from now on, of what is taken here and of standbys. A receiver that falls 64 events behind misses the oldest.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<MoveEvent> {
        self.events.subscribe()
    }

    /// Takes the program. When this returns `Ok`, this host owns it: its threads may run, and fault their pages in.
    ///
    /// Cancellation: dropping the future does not stop the handover, which then ends with a program that nobody here runs: keep it until it returns.
    ///
    /// # Errors
    /// [`MoveError::Aborted`] and [`MoveError::Lost`]: the program runs on at the source. [`MoveError::Region`]: a region cannot be mapped here, for instance because its
    /// fixed address is taken; the program runs on at the source. [`MoveError::Unknown`]: see there.
    pub async fn take(&self, strategy: Strategy) -> Result<Moved, MoveError> {
        let taking = Taking::new(self.means(), Destination::new_session()?, strategy);
        // On the service: the stream's tasks, and the pull after it, must not depend on threads that may fault (S2).
        self.pager.service().spawn(taking.run()).await.map_err(|_| MoveError::Closed)?
    }

    pub(super) fn new_session() -> Result<SessionId, MoveError> {
        let mut session = [0; 16];
        let random = ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut session);
        random.map_err(|_| MoveError::Protocol("the operating system gives no random numbers".into()))?;
        Ok(u128::from_le_bytes(session))
    }

    pub(super) fn means(&self) -> Means {
        Means {
            peer: self.peer.clone(),
            pager: self.pager.clone(),
            loss: self.loss.clone(),
            fault_around: self.fault_around,
            step_limit: self.step_limit,
            decision_limit: self.decision_limit,
            events: self.events.clone(),
        }
    }
}

/// A program that lives here now.
#[derive(Debug)]
pub struct Moved {
    pub(super) regions: Vec<Region>,
    pub(super) state: Bytes,
    pub(super) epoch: u64,
    pub(super) completion: watch::Receiver<Option<Result<(), MoveError>>>,
    pub(super) events: broadcast::Sender<MoveEvent>,
}

impl Moved {
    /// The region of that name.
    #[must_use]
    pub fn region(&self, name: &str) -> Option<Region> {
        self.regions.iter().find(|region| region.name() == name).cloned()
    }

    /// All its regions, in the order in which the source granted them.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The program's small state, as the source's state function gave it.
    #[must_use]
    pub fn state(&self) -> &[u8] {
        &self.state
    }

    /// The number of this owner. A source that hands the program on starts with it ([`SourceBuilder::epoch`](super::SourceBuilder::epoch)).
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// News from now on. A receiver that falls 64 events behind misses the oldest.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<MoveEvent> {
        self.events.subscribe()
    }

    /// Returns when every page is here and the source has let go, or had [`LossPolicy::keep_trying`] to be told so.
    ///
    /// Cancellation: dropping the future changes nothing; dropping the `Moved` and its regions ends the pull.
    ///
    /// # Errors
    /// [`MoveError::Region`] with [`RegionError::Lost`](crate::RegionError::Lost) if the source was lost for good before.
    pub async fn complete(&self) -> Result<(), MoveError> {
        let mut completion = self.completion.clone();
        let done = completion.wait_for(Option::is_some).await.map_err(|_| MoveError::Closed)?;
        done.clone().unwrap_or(Err(MoveError::Closed))
    }
}
