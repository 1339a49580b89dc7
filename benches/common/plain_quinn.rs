//! Baseline: bytes over one quinn stream, with nothing at either end but a buffer.
//!
//! Role: what QUIC itself can move here, so that what paging costs beside it can be told. Neighbours: bench `throughput`; the far end is a
//! `server`. Invariants: one connection, one stream, one single-threaded runtime at each end, as a pageferry peer has; a connection is warm
//! (its MTU found, its window open) before the clock starts.

use super::{MIB, PAGE_BYTES, Result, far_end::field, measure::mb_s, server::Server};
use bytes::Bytes;
use quinn::{
    AsyncUdpSocket, ClientConfig, Connection, Endpoint, EndpointConfig, MtuDiscoveryConfig, RecvStream, Runtime, SendStream,
    ServerConfig, TokioRuntime, TransportConfig, UdpPoller, VarInt,
    udp::{RecvMeta, Transmit},
};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};
use std::{
    io::{self, IoSliceMut},
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

/// Transport options of both ends.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Options {
    /// quinn's own.
    Stock,
    /// pageferry's, with a largest datagram payload of this many bytes.
    Tuned { mtu: u16 },
}

/// quinn's default upper bound of the MTU: what an Ethernet carries.
pub const ETHERNET_MTU: u16 = 1452;
/// What jumbo frames carry.
pub const JUMBO_MTU: u16 = 8900;

/// Sent before the clock starts, for as often as the MTU needs to be found.
pub const WARM_UP_BYTES: u64 = 16 * MIB;
const WARM_UPS: usize = 8;

const STEP_BYTES: usize = MIB as usize;
const SOCKET_BUFFER_BYTES: usize = 4 * MIB as usize;
const WINDOW_BYTES: u32 = 16 * MIB as u32;

impl Options {
    pub fn mtu(self) -> u16 {
        match self {
            Options::Stock => ETHERNET_MTU,
            Options::Tuned { mtu } => mtu,
        }
    }

    fn message(self) -> Value {
        match self {
            Options::Stock => Value::Null,
            Options::Tuned { mtu } => mtu.into(),
        }
    }

    fn from_message(message: &Value) -> Option<Options> {
        match message {
            Value::Null => Some(Options::Stock),
            _ => Some(Options::Tuned { mtu: u16::try_from(message.as_u64()?).ok()? }),
        }
    }

    /// These must be those of pageferry's endpoint, or the baseline is another's.
    fn transport(self) -> Arc<TransportConfig> {
        let mut transport = TransportConfig::default();
        if let Options::Tuned { mtu } = self {
            let mut discovery = MtuDiscoveryConfig::default();
            discovery.upper_bound(mtu);
            transport.mtu_discovery_config(Some(discovery));
            transport.stream_receive_window(VarInt::from_u32(WINDOW_BYTES));
            transport.send_window(u64::from(WINDOW_BYTES));
        }
        Arc::new(transport)
    }

    fn endpoint(self, server: Option<ServerConfig>) -> Result<Endpoint> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        let mut config = EndpointConfig::default();
        if let Options::Tuned { mtu } = self {
            let buffers = socket2::SockRef::from(&socket);
            buffers.set_recv_buffer_size(SOCKET_BUFFER_BYTES)?;
            buffers.set_send_buffer_size(SOCKET_BUFFER_BYTES)?;
            config.max_udp_payload_size(mtu)?;
        }
        let runtime = Arc::new(TokioRuntime);
        let socket = Arc::new(WholeBatches { socket: runtime.wrap_udp_socket(socket)?, mtu: self.mtu() });
        Ok(Endpoint::new_with_abstract_socket(config, server, socket, runtime)?)
    }
}

/// A socket that takes no more datagrams at a time than the kernel does.
///
/// quinn packs ten into one call, the kernel refuses more than 64 KiB, and quinn-udp drops the refused batch without a word: above
/// an MTU of 6550 every full batch is lost.
#[derive(Debug)]
struct WholeBatches {
    socket: Arc<dyn AsyncUdpSocket>,
    mtu: u16,
}

impl AsyncUdpSocket for WholeBatches {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.socket.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.socket.try_send(transmit)
    }

    fn poll_recv(&self, cx: &mut Context<'_>, into: &mut [IoSliceMut<'_>], meta: &mut [RecvMeta]) -> Poll<io::Result<usize>> {
        self.socket.poll_recv(cx, into, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.socket.max_transmit_segments().min(65_000 / usize::from(self.mtu)).max(1)
    }

    fn max_receive_segments(&self) -> usize {
        self.socket.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.socket.may_fragment()
    }
}

/// The end that sends: listens on a thread of its own for as long as the process lives.
pub fn listen(pages: Bytes, question: &Value) -> Result<Value> {
    let options = field(question, "mtu", Options::from_message)?;
    let key = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
    let certificate = key.cert.der().clone();
    let private = PrivatePkcs8KeyDer::from(key.signing_key.serialize_der());
    let mut config = ServerConfig::with_single_cert(vec![certificate.clone()], private.into())?;
    config.transport_config(options.transport());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let endpoint = {
        let _runtime = runtime.enter();
        options.endpoint(Some(config))?
    };
    let address = endpoint.local_addr()?.to_string();
    std::thread::spawn(move || {
        runtime.block_on(async {
            while let Some(incoming) = endpoint.accept().await {
                let pages = pages.clone();
                tokio::spawn(async move {
                    // A client that goes away ends its connection, and only that.
                    let Ok(connection) = incoming.await else { return };
                    while let Ok((send, receive)) = connection.accept_bi().await {
                        if let Err(error) = send_range(&pages, send, receive).await {
                            eprintln!("the sending end: {error}");
                        }
                    }
                });
            }
        });
    });
    Ok(json!({ "address": address, "certificate": certificate.to_vec() }))
}

async fn send_range(pages: &Bytes, mut send: SendStream, mut receive: RecvStream) -> Result<()> {
    let mut request = [0; 8];
    receive.read_exact(&mut request).await?;
    let len = usize::try_from(u64::from_le_bytes(request))?;
    let mut rest = pages.get(..len).map(|range| pages.slice_ref(range)).ok_or("asked for more than there is")?;
    while !rest.is_empty() {
        send.write_chunk(rest.split_to(rest.len().min(STEP_BYTES))).await?;
    }
    send.finish()?;
    Ok(())
}

/// Connects, warms up, and gives the rate at which `bytes` come in.
pub fn download_mb_s(server: &mut Server, options: Options, bytes: u64) -> Result<f64> {
    let listening = server.listen("quinn", json!({ "mtu": options.message() }))?;
    let address: SocketAddr = field(&listening, "address", Value::as_str)?.parse()?;
    let certificate: Vec<u8> = serde_json::from_value(listening["certificate"].clone())?;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from(certificate))?;
    let mut config = ClientConfig::with_root_certificates(Arc::new(roots))?;
    config.transport_config(options.transport());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let endpoint = options.endpoint(None)?;
        let connection = endpoint.connect_with(config, address, "localhost")?.await?;
        let mut buffer = vec![0; STEP_BYTES];
        warm_up(&connection, server, options, &mut buffer).await?;
        let start = Instant::now();
        receive(&connection, bytes, &mut buffer, |_, _| Ok(())).await?;
        let rate = mb_s(bytes, start);
        check(server, bytes - STEP_BYTES as u64, &buffer)?;
        connection.close(VarInt::from_u32(0), b"done");
        endpoint.wait_idle().await;
        Ok(rate)
    })
}

/// Every byte of a warm-up is checked; of what is timed, the count and the last step.
async fn warm_up(connection: &Connection, server: &Server, options: Options, buffer: &mut [u8]) -> Result<()> {
    for _ in 0..WARM_UPS {
        receive(connection, WARM_UP_BYTES, buffer, |offset, step| check(server, offset, step)).await?;
        if connection.stats().path.current_mtu >= options.mtu() - MTU_SLACK_BYTES {
            return Ok(());
        }
    }
    let mtu = connection.stats().path.current_mtu;
    Err(format!("the MTU stayed at {mtu} of {} after {WARM_UPS} times {WARM_UP_BYTES} bytes", options.mtu()).into())
}

/// Discovery stops when the next step would gain no more than this (quinn's `minimum_change`).
const MTU_SLACK_BYTES: u16 = 20;

fn check(server: &Server, offset: u64, step: &[u8]) -> Result<()> {
    let first = offset / PAGE_BYTES;
    server.image().check(first..first + step.len() as u64 / PAGE_BYTES, |page, into| {
        let at = ((page - first) * PAGE_BYTES) as usize;
        into.copy_from_slice(&step[at..at + into.len()]);
        Ok(())
    })
}

async fn receive(
    connection: &Connection,
    bytes: u64,
    buffer: &mut [u8],
    mut step: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let (mut send, mut receive) = connection.open_bi().await?;
    send.write_all(&bytes.to_le_bytes()).await?;
    send.finish()?;
    let (mut offset, mut filled) = (0, 0);
    while let Some(len) = receive.read(&mut buffer[filled..]).await? {
        filled += len;
        if filled == buffer.len() {
            step(offset, buffer)?;
            (offset, filled) = (offset + filled as u64, 0);
        }
    }
    if offset == bytes && filled == 0 { Ok(()) } else { Err(format!("{} of {bytes} bytes came", offset + filled as u64).into()) }
}
