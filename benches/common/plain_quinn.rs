//! Baseline: bytes over one quinn stream, with nothing at either end but a buffer.
//!
//! Role: what QUIC itself can move here, so that what paging costs beside it can be told. Neighbours: bench `throughput`; the far end is a
//! `server`. Invariants: one connection, one stream, one single-threaded runtime at each end, as a pageferry peer has; a connection is warm
//! (its MTU found, its window open) before the clock starts.

use super::{
    MIB, PAGE_BYTES, Result,
    far_end::field,
    measure::{a_gib, mb_s},
    server::Server,
};
use bytes::Bytes;
use pageferry::TransportOptions;
use quinn::{
    ClientConfig, Connection, Endpoint, EndpointConfig, RecvStream, SendStream, ServerConfig, TokioRuntime, TransportConfig, VarInt,
};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};
use std::{
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    sync::Arc,
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

    /// An endpoint, and the transport options of its connections: quinn's own, or just those of pageferry's peers.
    fn endpoint(self, server: Option<ServerConfig>) -> Result<(Endpoint, TransportConfig)> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let Options::Tuned { mtu } = self else {
            let socket = UdpSocket::bind(address)?;
            let endpoint = Endpoint::new(EndpointConfig::default(), server, socket, Arc::new(TokioRuntime))?;
            return Ok((endpoint, TransportConfig::default()));
        };
        let options = TransportOptions { mtu_max_bytes: mtu, ..TransportOptions::default() };
        Ok(options.baseline(address, server)?)
    }
}

/// The end that sends: listens on a thread of its own for as long as the process lives.
pub fn listen(pages: Bytes, question: &Value) -> Result<Value> {
    let options = field(question, "mtu", Options::from_message)?;
    let key = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
    let certificate = key.cert.der().clone();
    let private = PrivatePkcs8KeyDer::from(key.signing_key.serialize_der());
    let config = ServerConfig::with_single_cert(vec![certificate.clone()], private.into())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let endpoint = {
        let _runtime = runtime.enter();
        options.endpoint(Some(config))?.0
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

/// Connects, warms up, and gives the rate at which `bytes` come in, and the CPU seconds of both processes a GiB.
pub fn download(server: &mut Server, options: Options, bytes: u64) -> Result<[f64; 2]> {
    let listening = server.listen("quinn", json!({ "mtu": options.message() }))?;
    let address: SocketAddr = field(&listening, "address", Value::as_str)?.parse()?;
    let certificate: Vec<u8> = serde_json::from_value(listening["certificate"].clone())?;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from(certificate))?;
    let mut config = ClientConfig::with_root_certificates(Arc::new(roots))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (endpoint, transport) = options.endpoint(None)?;
        config.transport_config(Arc::new(transport));
        let connection = endpoint.connect_with(config, address, "localhost")?.await?;
        let mut buffer = vec![0; STEP_BYTES];
        warm_up(&connection, server, options, &mut buffer).await?;
        let cpu_before_s = server.cpu_of_both_s()?;
        let start = Instant::now();
        receive(&connection, bytes, &mut buffer, |_, _| Ok(())).await?;
        let rate = mb_s(bytes, start);
        let cpu_s = server.cpu_of_both_s()? - cpu_before_s;
        check(server, bytes - STEP_BYTES as u64, &buffer)?;
        connection.close(VarInt::from_u32(0), b"done");
        endpoint.wait_idle().await;
        Ok([rate, a_gib(cpu_s, bytes)])
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
