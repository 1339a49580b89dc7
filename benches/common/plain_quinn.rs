//! Baselines: bytes over one quinn stream, into a buffer, and from there into a region by bare installs.
//!
//! Role: what QUIC itself can move here, and the least that anybody can do who pages over it, so that what pageferry costs beside them can be told.
//! Neighbours: bench `throughput`; the far end is a `server`, the region a `raw` one. Invariants: one connection, one stream, one single-threaded runtime
//! at each end, as a pageferry peer has; a connection is warm (its MTU found, its window open) before the clock starts.

use super::{
    MIB, PAGE_BYTES, Result,
    far_end::field,
    measure::{a_gib, mb_s},
    raw::RawRegion,
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
use tokio::{runtime::Runtime, sync::mpsc};

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

/// What is installed at a time, and how many buffers of that size there are: one filled, one installed, one on the way.
const INSTALL_BYTES: usize = 256 * 1024;
const INSTALL_BUFFERS: usize = 3;

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

/// A connection to the sending end, warm.
struct Client {
    runtime: Runtime,
    endpoint: Endpoint,
    connection: Connection,
}

impl Client {
    fn connect(server: &mut Server, options: Options) -> Result<Client> {
        let listening = server.listen("quinn", json!({ "mtu": options.message() }))?;
        let address: SocketAddr = field(&listening, "address", Value::as_str)?.parse()?;
        let certificate: Vec<u8> = serde_json::from_value(listening["certificate"].clone())?;
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from(certificate))?;
        let mut config = ClientConfig::with_root_certificates(Arc::new(roots))?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (endpoint, connection) = runtime.block_on(async {
            let (endpoint, transport) = options.endpoint(None)?;
            config.transport_config(Arc::new(transport));
            let connection = endpoint.connect_with(config, address, "localhost")?.await?;
            warm_up(&connection, server, options).await?;
            Result::Ok((endpoint, connection))
        })?;
        Ok(Client { runtime, endpoint, connection })
    }

    /// The rate at which `bytes` come in by `transfer`, the CPU seconds of both processes a GiB, and what it gives.
    fn time<T>(&self, server: &mut Server, bytes: u64, transfer: impl Future<Output = Result<T>>) -> Result<([f64; 2], T)> {
        let cpu_before_s = server.cpu_of_both_s()?;
        let start = Instant::now();
        let given = self.runtime.block_on(transfer)?;
        let rate = mb_s(bytes, start);
        let cpu_s = server.cpu_of_both_s()? - cpu_before_s;
        Ok(([rate, a_gib(cpu_s, bytes)], given))
    }

    fn close(self) {
        self.connection.close(VarInt::from_u32(0), b"done");
        self.runtime.block_on(self.endpoint.wait_idle());
    }
}

/// `bytes` into one buffer: the rate, and the CPU seconds of both processes a GiB.
pub fn download(server: &mut Server, options: Options, bytes: u64) -> Result<[f64; 2]> {
    let client = Client::connect(server, options)?;
    let transfer = receive(&client.connection, bytes, vec![0; STEP_BYTES], async |_, buffer| Ok(buffer));
    let (figures, buffer) = client.time(server, bytes, transfer)?;
    check(server, bytes - STEP_BYTES as u64, &buffer)?;
    client.close();
    Ok(figures)
}

/// `bytes` into a new region: a second thread installs each buffer that is full and gives it back. The rate until all is there, and the CPU seconds of both
/// processes a GiB.
pub fn install(server: &mut Server, options: Options, bytes: u64) -> Result<[f64; 2]> {
    let client = Client::connect(server, options)?;
    let region = RawRegion::new(usize::try_from(bytes)?)?;
    let (full, mut installing) = mpsc::channel::<(u64, Vec<u8>)>(INSTALL_BUFFERS);
    let (back, mut free) = mpsc::channel(INSTALL_BUFFERS);
    for _ in 1..INSTALL_BUFFERS {
        back.try_send(vec![0; INSTALL_BYTES])?;
    }
    let (figures, ()) = std::thread::scope(|scope| {
        let installer = scope.spawn(|| -> Result<()> {
            // Owned by this thread: whoever waits for a buffer is told when it ends.
            let back = back;
            while let Some((offset, buffer)) = installing.blocking_recv() {
                region.install(usize::try_from(offset)?, &buffer)?;
                // Nobody needs the last ones.
                let _ = back.blocking_send(buffer);
            }
            Ok(())
        });
        let transfer = async {
            let full = full;
            let came = receive(&client.connection, bytes, vec![0; INSTALL_BYTES], async |offset, buffer| {
                // Both fail only if the installer ended, which says why.
                let _ = full.send((offset, buffer)).await;
                free.recv().await.ok_or_else(|| "the installer ended".into())
            });
            let came = came.await.map(drop);
            drop(full);
            // All has come: there is nothing left that this thread could do meanwhile.
            installer.join().map_err(|_| "the installer panicked")??;
            came
        };
        client.time(server, bytes, transfer)
    })?;
    client.close();
    let image = server.image();
    image.check(0..bytes / PAGE_BYTES, |page, into| {
        region.read((page * PAGE_BYTES) as usize, into);
        Ok(())
    })?;
    Ok(figures)
}

/// Every byte of a warm-up is checked; of what is timed, the count and the last step, or all that was installed.
async fn warm_up(connection: &Connection, server: &Server, options: Options) -> Result<()> {
    let mut buffer = vec![0; STEP_BYTES];
    for _ in 0..WARM_UPS {
        buffer = receive(connection, WARM_UP_BYTES, buffer, async |offset, buffer| {
            check(server, offset, &buffer)?;
            Ok(buffer)
        })
        .await?;
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

/// Fills `buffer` again and again until `bytes` have come, which are whole buffers. `step` is given each full one with its offset and gives the next to fill; the last
/// that it gives is handed on.
async fn receive(
    connection: &Connection,
    bytes: u64,
    mut buffer: Vec<u8>,
    mut step: impl AsyncFnMut(u64, Vec<u8>) -> Result<Vec<u8>>,
) -> Result<Vec<u8>> {
    let (mut send, mut receive) = connection.open_bi().await?;
    send.write_all(&bytes.to_le_bytes()).await?;
    send.finish()?;
    let (mut offset, mut filled) = (0, 0);
    while let Some(len) = receive.read(&mut buffer[filled..]).await? {
        filled += len;
        if filled == buffer.len() {
            buffer = step(offset, buffer).await?;
            (offset, filled) = (offset + filled as u64, 0);
        }
    }
    if offset == bytes && filled == 0 {
        Ok(buffer)
    } else {
        Err(format!("{} of {bytes} bytes came", offset + filled as u64).into())
    }
}
