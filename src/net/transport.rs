//! How QUIC is set up: windows, packet sizes, acknowledgements, time-outs, sockets.
//!
//! Role: hop *wire*. Neighbours: `peer` and `server` open their endpoints here, on a socket of `socket`, or of `shaped`. Invariants: option values that would hang a
//! connection are refused.

use super::{identity::Identity, shape::LinkShape, shaped::ShapedSocket, socket::QuicSocket};
use crate::{NetError, Service};
use quinn::{AsyncTimer, AsyncUdpSocket, EndpointConfig, MtuDiscoveryConfig, Runtime, TokioRuntime, TransportConfig, VarInt};
use quinn_proto::HashedConnectionIdGenerator;
use socket2::{Domain, Protocol, Socket, Type};
use std::{
    fmt, io,
    net::{SocketAddr, UdpSocket},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

/// Options of a connection. Both ends may choose their own; where they meet, the smaller counts.
///
/// ```
/// use pageferry::TransportOptions;
/// let mut options = TransportOptions::default();
/// options.mtu_max_bytes = 1452; // a path known to be plain Ethernet: no probing for more
/// assert!(options.check().is_ok());
/// ```
#[derive(Clone, Debug)]
pub struct TransportOptions {
    /// Bulk bytes that may be on the way to this end on one stream: bandwidth times round trip. Default 128 MiB: 10 Gbit/s at 100 ms are 125 MB. Memory is
    /// used only as the path fills it.
    pub stream_window_bytes: u32,
    /// Bytes on all streams that this end keeps until acknowledged. Default 160 MiB: room for requests while a bulk stream has its window full.
    pub send_window_bytes: u64,
    /// Bytes that may be on the way before the first acknowledgement has come, after which the path's answers decide (CUBIC, RFC 9438), paced over a round trip. Default 1 MiB: what 1 Gbit/s
    /// holds at 8 ms. The 14720 bytes of RFC 9002, which are for paths that nobody knows, take ten round trips to fill one of 4 Gbit/s at 25 ms. Less for a path of a few Mbit/s. 2400 to 16 MiB.
    pub initial_window_bytes: u32,
    /// The largest datagram that discovery may climb to, in bytes of UDP payload; 1200 to 9000. Default 8900: a jumbo frame of 9000 bytes
    /// less headers and tunnels. Where the path carries less, discovery finds less.
    pub mtu_max_bytes: u16,
    /// Packets received before one must be acknowledged at once (draft-ietf-quic-ack-frequency). Default 16: an acknowledgement of its own costs a datagram and
    /// a wake-up; most ride on the next request or reply instead.
    pub ack_every_packets: u32,
    /// The longest delay of an acknowledgement. Default 5 ms: well under the retransmission time-out of a LAN path.
    pub ack_delay_max: Duration,
    /// A connection on which nothing arrives for this long is lost. Default 10 s: a third of the 30 s of the default loss policy, so that there is time to
    /// reconnect. At least 100 ms.
    pub idle_timeout: Duration,
    /// How often an idle connection is kept alive, and a dead path noticed. Default 2 s. Must be below `idle_timeout`.
    pub keep_alive: Duration,
    /// The round trip assumed before the first measurement. Default 100 ms (RFC 9002 says 333 ms for paths nobody knows): it only sets how soon a lost
    /// first packet is sent again.
    pub initial_rtt: Duration,
    /// How long a connection attempt may take. Default 5 s.
    pub connect_timeout: Duration,
    /// How long a request may go without the next piece of its answer while the connection itself is alive: the store behind the server hangs, or the server does.
    /// The request fails as if the peer were away then. Default 10 s, as `idle_timeout`. Flushes are exempt: how long a disk takes says nothing.
    pub answer_timeout: Duration,
    /// Socket buffers asked for; `net.core.rmem_max` and `wmem_max` may grant less. Default 4 MiB: 3 ms of 10 Gbit/s while the thread does something else.
    pub socket_buffer_bytes: usize,
    /// Whether bulk pages are compressed where that saves at least an eighth. Default true.
    pub compress: bool,
    /// What the path is made to look like, in both directions: delay, rate, loss, and more. Default none: it is left as it is, at no cost.
    pub shape: Option<LinkShape>,
}

impl Default for TransportOptions {
    fn default() -> TransportOptions {
        TransportOptions {
            stream_window_bytes: 128 << 20,
            send_window_bytes: 160 << 20,
            initial_window_bytes: 1 << 20,
            mtu_max_bytes: 8900,
            ack_every_packets: 16,
            ack_delay_max: Duration::from_millis(5),
            idle_timeout: Duration::from_secs(10),
            keep_alive: Duration::from_secs(2),
            initial_rtt: Duration::from_millis(100),
            connect_timeout: Duration::from_secs(5),
            answer_timeout: Duration::from_secs(10),
            socket_buffer_bytes: 4 << 20,
            compress: true,
            shape: None,
        }
    }
}

pub(super) const MTU_MIN_BYTES: u16 = 1200;
pub(super) const MTU_LIMIT_BYTES: u16 = 9000;

impl TransportOptions {
    /// Whether every value lies in its range.
    ///
    /// # Errors
    /// [`NetError::InvalidOption`] names the option, the value and what is allowed.
    pub fn check(&self) -> Result<(), NetError> {
        let invalid = |option, value: &dyn fmt::Debug, allowed: &str| {
            Err(NetError::InvalidOption { option, value: format!("{value:?}"), allowed: allowed.to_owned() })
        };
        if !(MTU_MIN_BYTES..=MTU_LIMIT_BYTES).contains(&self.mtu_max_bytes) {
            return invalid("mtu_max_bytes", &self.mtu_max_bytes, "1200 to 9000");
        }
        if self.stream_window_bytes < 1 << 20 {
            return invalid("stream_window_bytes", &self.stream_window_bytes, "at least 1 MiB, the largest frame");
        }
        if self.send_window_bytes < u64::from(self.stream_window_bytes) {
            return invalid(
                "send_window_bytes",
                &self.send_window_bytes,
                "at least stream_window_bytes, or requests wait behind bulk",
            );
        }
        if !(2 * u32::from(MTU_MIN_BYTES)..=16 << 20).contains(&self.initial_window_bytes) {
            return invalid("initial_window_bytes", &self.initial_window_bytes, "2400 to 16 MiB");
        }
        if self.idle_timeout < Duration::from_millis(100) || self.idle_timeout > Duration::from_secs(3600) {
            return invalid("idle_timeout", &self.idle_timeout, "100 ms to 1 h");
        }
        if self.keep_alive.is_zero() || self.keep_alive >= self.idle_timeout {
            return invalid("keep_alive", &self.keep_alive, "above 0 and below idle_timeout");
        }
        if self.ack_every_packets == 0 || self.ack_every_packets > 1000 {
            return invalid("ack_every_packets", &self.ack_every_packets, "1 to 1000");
        }
        for (option, value) in [("connect_timeout", self.connect_timeout), ("answer_timeout", self.answer_timeout)] {
            if value.is_zero() {
                return invalid(option, &value, "above 0");
            }
        }
        self.shape.as_ref().map_or(Ok(()), LinkShape::check)
    }

    /// What pageferry's own endpoints are, for a baseline that must differ from them in nothing but what it carries. Inside a runtime.
    #[doc(hidden)]
    pub fn baseline(
        &self,
        address: SocketAddr,
        server: Option<quinn::ServerConfig>,
    ) -> Result<(quinn::Endpoint, TransportConfig), NetError> {
        let runtime = PrivateRuntime { handle: tokio::runtime::Handle::current() };
        let (config, mut server) = (self.quinn()?, server);
        if let Some(server) = &mut server {
            server.transport_config(Arc::new(self.quinn()?));
        }
        Ok((self.endpoint(address, server, EndpointConfig::default(), &runtime)?, config))
    }

    /// The same for quinn.
    pub(super) fn quinn(&self) -> Result<TransportConfig, NetError> {
        self.check()?;
        let mut mtu = MtuDiscoveryConfig::default();
        mtu.upper_bound(self.mtu_max_bytes);
        let mut ack = quinn::AckFrequencyConfig::default();
        ack.ack_eliciting_threshold(VarInt::from_u32(self.ack_every_packets));
        ack.max_ack_delay(Some(self.ack_delay_max));
        let mut congestion = quinn::congestion::CubicConfig::default();
        congestion.initial_window(self.initial_window_bytes.into());
        let mut config = TransportConfig::default();
        config
            .congestion_controller_factory(Arc::new(congestion))
            .stream_receive_window(VarInt::from_u32(self.stream_window_bytes))
            .receive_window(VarInt::from_u32(self.stream_window_bytes.saturating_mul(2).min(1 << 30)))
            .send_window(self.send_window_bytes)
            // Streams of one priority are served in turn only among themselves; within it, first come first served halves the wait of a reply.
            .send_fairness(false)
            .mtu_discovery_config(Some(mtu))
            .ack_frequency_config(Some(ack))
            .keep_alive_interval(Some(self.keep_alive))
            .max_idle_timeout(self.idle_timeout.try_into().ok())
            .initial_rtt(self.initial_rtt)
            .max_concurrent_bidi_streams(VarInt::from_u32(STREAMS_MAX))
            .max_concurrent_uni_streams(VarInt::from_u32(0))
            .datagram_receive_buffer_size(None);
        Ok(config)
    }

    /// Opens a socket and an endpoint on the given runtime; a server's with the identity that it serves as.
    pub(super) fn endpoint(
        &self,
        address: SocketAddr,
        server: Option<quinn::ServerConfig>,
        mut config: EndpointConfig,
        runtime: &PrivateRuntime,
    ) -> Result<quinn::Endpoint, NetError> {
        let failed = |call, source: io::Error| NetError::Socket { call, address, source: Arc::new(source) };
        let socket = self.bind(address).map_err(|error| failed("opening a UDP socket", error))?;
        // Caps what the peer's discovery may climb to, and sizes the receive buffers.
        config.max_udp_payload_size(self.mtu_max_bytes).map_err(|error| NetError::InvalidOption {
            option: "mtu_max_bytes",
            value: self.mtu_max_bytes.to_string(),
            allowed: error.to_string(),
        })?;
        let runtime = Arc::new(runtime.clone());
        let socket = QuicSocket::new(socket, self.mtu_max_bytes, &runtime);
        let registered = socket.and_then(|socket| -> io::Result<Arc<dyn AsyncUdpSocket>> {
            match &self.shape {
                None => Ok(Arc::new(socket)),
                Some(shape) => Ok(Arc::new(ShapedSocket::new(socket, shape, runtime.handle())?)),
            }
        });
        let socket = registered.map_err(|error| failed("registering a UDP socket", error))?;
        quinn::Endpoint::new_with_abstract_socket(config, server, socket, runtime)
            .map_err(|error| failed("opening a QUIC endpoint", error))
    }

    fn bind(&self, address: SocketAddr) -> io::Result<UdpSocket> {
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM.nonblocking().cloexec(), Some(Protocol::UDP))?;
        // Smaller buffers cost speed, not correctness.
        let sized =
            socket.set_recv_buffer_size(self.socket_buffer_bytes).and(socket.set_send_buffer_size(self.socket_buffer_bytes));
        if let Err(error) = sized {
            tracing::debug!(%error, "socket buffers stay as they are");
        }
        socket.bind(&address.into())?;
        Ok(socket.into())
    }
}

/// The configuration of an endpoint that a restarted server shares with the one before it. What it gets on connections that it does not know it answers
/// with a stateless reset (RFC 9000, 10.3), which only the key of the earlier endpoint can make: a client then dials anew at once, and does
/// not wait for its idle time-out. Another server with the same identity can reset a connection only for somebody who sees its
/// connection IDs, and who sees them can as well drop its packets.
pub(super) fn recognisable(identity: &Identity) -> EndpointConfig {
    let reset_key = identity.secret("pageferry stateless reset");
    let mut config = EndpointConfig::new(Arc::new(ring::hmac::Key::new(ring::hmac::HMAC_SHA256, reset_key.as_ref())));
    // IDs of connections are marked as such, for packets that are no QUIC to be dropped cheaply; without the same mark the reset is not even tried.
    let mark = identity.secret("pageferry connection ids");
    let mark = mark.as_ref().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(mark)));
    config
}

/// quinn's work done on a service's runtime, whichever runtime the caller is in (S2).
#[derive(Clone, Debug)]
pub(super) struct PrivateRuntime {
    handle: tokio::runtime::Handle,
}

impl PrivateRuntime {
    pub(super) fn of(service: &Service) -> PrivateRuntime {
        PrivateRuntime { handle: service.handle().clone() }
    }

    pub(super) fn handle(&self) -> &tokio::runtime::Handle {
        &self.handle
    }
}

impl Runtime for PrivateRuntime {
    fn new_timer(&self, at: std::time::Instant) -> Pin<Box<dyn AsyncTimer>> {
        let _context = self.handle.enter();
        TokioRuntime.new_timer(at)
    }

    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        self.handle.spawn(future);
    }

    fn wrap_udp_socket(&self, socket: UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        let _context = self.handle.enter();
        TokioRuntime.wrap_udp_socket(socket)
    }
}

/// Waits for `work`, no longer than `limit` by the service's clock: the runtime that the caller is in may have none.
pub(super) async fn within<T>(service: &Service, limit: Duration, work: impl Future<Output = T>) -> Option<T> {
    let late = {
        let _context = service.handle().enter();
        tokio::time::sleep(limit)
    };
    tokio::select! {
        biased;
        done = work => Some(done),
        () = late => None,
    }
}

/// Streams a client may have open at once: its lanes, pulls, and moves.
pub(super) const STREAMS_MAX: u32 = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_fill_a_path_of_100_ms_and_10_gbit_s() {
        let options = TransportOptions::default();
        let path_bytes = 10_000_000_000 / 8 / 10;
        assert!(u64::from(options.stream_window_bytes) >= path_bytes);
        assert!(options.send_window_bytes > u64::from(options.stream_window_bytes));
        assert!(options.quinn().is_ok());
    }

    #[test]
    fn values_that_would_hang_are_refused_with_the_range() {
        type Change = fn(&mut TransportOptions);
        let changes: [(&str, Change); 10] = [
            ("mtu_max_bytes", |o| o.mtu_max_bytes = 12_000),
            ("stream_window_bytes", |o| o.stream_window_bytes = 1000),
            ("send_window_bytes", |o| o.send_window_bytes = 1000),
            ("initial_window_bytes", |o| o.initial_window_bytes = 1200),
            ("idle_timeout", |o| o.idle_timeout = Duration::ZERO),
            ("keep_alive", |o| o.keep_alive = Duration::from_secs(60)),
            ("ack_every_packets", |o| o.ack_every_packets = 0),
            ("connect_timeout", |o| o.connect_timeout = Duration::ZERO),
            ("answer_timeout", |o| o.answer_timeout = Duration::ZERO),
            ("shape.loss", |o| o.shape = Some(LinkShape { loss: 2.0, ..LinkShape::default() })),
        ];
        for (name, change) in changes {
            let mut options = TransportOptions::default();
            change(&mut options);
            let error = options.check().unwrap_err();
            assert!(matches!(error, NetError::InvalidOption { option, .. } if option == name), "{error}");
        }
    }
}
