//! pageferry's own peers, as the benches use them.
//!
//! Role: the one place that knows how a server is started and a peer reached. Neighbours: the far end is a `server`; both benches open regions over
//! what `Ferry::connect` gives. Invariants: both ends prove a key; default options but for the MTU, and for polling where a case says so.

use super::{
    PAGE_BYTES, Result,
    far_end::field,
    plain_quinn::{Options, WARM_UP_BYTES},
    server,
};
use bytes::Bytes;
use pageferry::{
    DEFAULT_POLL_BUDGET, Grant, Hop, Identity, LinkShape, MemoryStore, PageSize, PageStore, Pager, PagerOptions, Peer, PeerId,
    Region, RegionBuilder, Server, Service, TransportOptions, Trust,
};
use serde_json::{Value, json};
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::runtime::Runtime;

const GRANT: &str = "bench";

/// The end that has the pages: serves them to one client for as long as `servers` lives.
pub fn listen(pages: Bytes, question: &Value, servers: &mut Vec<Server>) -> Result<Value> {
    let identity = Identity::generate()?;
    let client: PeerId = field(question, "client", Value::as_str)?.parse()?;
    let mtu = u16::try_from(field(question, "mtu", Value::as_u64)?)?;
    // The thread that a server starts by itself, but for the budget.
    let service = Service::start("pageferry-serve", Duration::from_micros(field(question, "poll_us", Value::as_u64)?))?;
    let store = MemoryStore::from_bytes(pages, PageSize::KIB_4);
    let server =
        Server::builder(&identity).grant(client, GRANT, store, Grant::ReadWrite).transport(transport(mtu)).service(&service);
    let server = server.listen("127.0.0.1:0".parse::<SocketAddr>()?)?;
    let answer = json!({ "address": server.local_addr().to_string(), "id": identity.peer_id().to_string() });
    servers.push(server);
    Ok(answer)
}

/// A connection to the server, with a pager.
pub struct Ferry {
    pub peer: Peer,
    pub pager: Pager,
    runtime: Runtime,
    store: Arc<dyn PageStore>,
}

impl Ferry {
    /// Both ends poll for up to `poll_budget` before they sleep.
    pub fn connect(server: &mut server::Server, options: Options, poll_budget: Duration) -> Result<Ferry> {
        Ferry::connect_by(server, transport(options.mtu()), poll_budget)
    }

    /// The same over a link that takes `rtt` more for there and back, with default polling. A link of no delay costs as much: what differs is the round trip.
    pub fn over_a_link(server: &mut server::Server, mtu: u16, rtt: Duration) -> Result<Ferry> {
        let shape = Some(LinkShape { rtt, ..LinkShape::default() });
        Ferry::connect_by(server, TransportOptions { shape, ..transport(mtu) }, DEFAULT_POLL_BUDGET)
    }

    fn connect_by(server: &mut server::Server, options: TransportOptions, poll_budget: Duration) -> Result<Ferry> {
        let identity = Identity::generate()?;
        let client = identity.peer_id().to_string();
        let poll_us = u64::try_from(poll_budget.as_micros())?;
        let listening = server.listen("quic", json!({ "client": client, "mtu": options.mtu_max_bytes, "poll_us": poll_us }))?;
        let address: SocketAddr = field(&listening, "address", Value::as_str)?.parse()?;
        let id: PeerId = field(&listening, "id", Value::as_str)?.parse()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;

        let pager = Pager::start(&PagerOptions { poll_budget, ..PagerOptions::default() })?;
        let peer = Peer::builder(address, Trust::ids([id]), &identity).transport(options).service(pager.service());
        let peer = runtime.block_on(peer.connect())?;
        let store = Arc::new(runtime.block_on(peer.open(GRANT))?);
        Ok(Ferry { peer, pager, runtime, store })
    }

    /// A region filled from the server.
    pub fn region(&self) -> RegionBuilder {
        Region::builder().pager(&self.pager).shared_store(self.store.clone())
    }

    /// What it serves.
    pub fn store(&self) -> Arc<dyn PageStore> {
        self.store.clone()
    }

    /// Waits for what has no runtime of its own.
    pub fn wait<T, E: Into<Box<dyn std::error::Error>>>(
        &self,
        future: impl Future<Output = std::result::Result<T, E>>,
    ) -> Result<T> {
        self.runtime.block_on(future).map_err(|error| error.into().to_string().into())
    }

    /// Brings all of a region in.
    pub fn pull(&self, region: &Region) -> Result<()> {
        Ok(self.runtime.block_on(region.pull())?)
    }

    /// What `plain_quinn` does before its clock starts: as many bytes, checked.
    pub fn warm_up(&self, server: &server::Server) -> Result<()> {
        let region = self.region().size(WARM_UP_BYTES).open()?;
        self.pull(&region)?;
        check(server, &region, 0..WARM_UP_BYTES / PAGE_BYTES)
    }
}

/// Compares a region's pages with the server's.
pub fn check(server: &server::Server, region: &Region, pages: impl IntoIterator<Item = u64>) -> Result<()> {
    server.image().check(pages, |page, into| Ok(region.read_at(page * PAGE_BYTES, into)?))
}

/// Mean microseconds of the hops that only a peer can measure, in the order of `HOP_KEYS` of bench `fault_latency`.
pub fn peer_hop_means_us(peer: &Peer) -> [f64; 4] {
    [Hop::Request, Hop::Wire, Hop::Serve, Hop::Reply].map(|hop| peer.hops().hop(hop).mean().as_nanos() as f64 / 1e3)
}

/// Default options but for the MTU.
fn transport(mtu: u16) -> TransportOptions {
    TransportOptions { mtu_max_bytes: mtu, ..TransportOptions::default() }
}
