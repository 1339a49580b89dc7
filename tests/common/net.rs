//! What the tests of the network share: content that names its page, ends with short time-outs, and a client and a server that speak raw
//! bytes, for what pageferry's own ends would never say.
//!
//! Frames are built here by hand from docs/protocol.md, not with the crate's encoder: a mistake there must not hide itself.

#![allow(dead_code, reason = "each test binary uses its own part")]

use pageferry::{Content, Extent, Identity, MemoryStore, PageSize, PageStore, Peer, PeerId, Run, TransportOptions, Trust};
use rustls::{
    DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::ring::default_provider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
};
use std::{
    future::Future,
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, LazyLock},
    time::Duration,
};

pub const PAGE: usize = 4096;
pub const KIB_4: PageSize = PageSize::KIB_4;
pub const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// No test waits longer than this for anything: what takes as long hangs.
pub const HANG: Duration = Duration::from_secs(60);

/// Fails the test instead of hanging it.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(HANG, future).await.unwrap_or_else(|_| panic!("{what} took longer than {HANG:?}"))
}

/// Whether this test may use userfaultfd. Says loudly that it is skipped, and fails where `REQUIRE_UFFD=1` forbids to skip.
pub fn userfaultfd() -> bool {
    let Err(error) = pageferry::Capabilities::probe().require_userfaultfd() else { return true };
    assert_ne!(std::env::var("REQUIRE_UFFD").as_deref(), Ok("1"), "REQUIRE_UFFD=1, but: {error}");
    eprintln!("SKIPPED: {error}");
    false
}

/// Numbers that look random and follow from a seed (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// An extent of 1 to `pages_max` pages inside `within`.
    pub fn extent(&mut self, within: Extent, pages_max: u64) -> Extent {
        let first = within.first() + self.below(within.count());
        Extent::between(first, within.end().min(first + 1 + self.below(pages_max)))
    }
}

/// The largest world, 16 MiB.
pub const WORLD_PAGES_MAX: u64 = 4096;

/// What page `page` of the world holds: zeros, noise that no compressor shrinks, or text, each in stretches of 3 pages. All but zeros name their page.
pub fn content(page: u64) -> &'static [u8] {
    contents(Extent::page(page))
}

/// The content of an extent.
pub fn contents(extent: Extent) -> &'static [u8] {
    static WORLD: LazyLock<Vec<u8>> = LazyLock::new(|| (0..WORLD_PAGES_MAX).map(make_content).collect::<Vec<_>>().concat());
    &WORLD[extent.first() as usize * PAGE..extent.end() as usize * PAGE]
}

fn make_content(page: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE];
    match page / 3 % 3 {
        0 => {}
        1 => {
            let mut random = Random(page);
            bytes.as_chunks_mut().0.iter_mut().for_each(|word| *word = random.next().to_le_bytes());
        }
        _ => bytes = format!("page {page} says little that is new; ").repeat(PAGE / 32).into_bytes(),
    }
    bytes.truncate(PAGE);
    bytes
}

/// A store of so many pages of [`content`].
pub fn world(pages: u64) -> MemoryStore {
    MemoryStore::from_bytes(contents(Extent::between(0, pages)), KIB_4)
}

/// Fails unless `runs` are exactly the world's pages of `extent`.
#[track_caller]
pub fn assert_world(extent: Extent, runs: &[Run]) {
    let mut next = extent.first();
    for run in runs {
        assert_eq!(run.extent.first(), next, "{extent}: the runs have a gap");
        assert_run(run);
        next = run.extent.end();
    }
    assert_eq!(next, extent.end(), "{extent}: the runs end early");
}

/// Fails unless a run holds the world's bytes.
#[track_caller]
pub fn assert_run(run: &Run) {
    let expected = contents(run.extent);
    let right = match &run.content {
        Content::Zero => expected.iter().all(|byte| *byte == 0),
        Content::Bytes(bytes) => *bytes == expected,
    };
    assert!(right, "{} hold other bytes than they should", run.extent);
}

/// Transport options for tests in which an end is lost: everything is noticed within about two seconds.
pub fn impatient() -> TransportOptions {
    TransportOptions {
        idle_timeout: Duration::from_millis(1500),
        keep_alive: Duration::from_millis(200),
        connect_timeout: Duration::from_millis(1000),
        ..TransportOptions::default()
    }
}

/// The keys of a server and of a client that it lets in.
pub struct Keys {
    pub server: Identity,
    pub client: Identity,
}

impl Keys {
    pub fn new() -> Keys {
        Keys { server: Identity::generate().unwrap(), client: Identity::generate().unwrap() }
    }

    pub fn client_id(&self) -> PeerId {
        self.client.peer_id()
    }

    /// The client's end of a connection to the server at `address`.
    pub async fn connect(&self, address: SocketAddr) -> Peer {
        self.connect_with(address, TransportOptions::default()).await
    }

    pub async fn connect_with(&self, address: SocketAddr, options: TransportOptions) -> Peer {
        let trust = Trust::ids([self.server.peer_id()]);
        Peer::builder(address, trust, &self.client).transport(options).connect().await.unwrap()
    }
}

/// A frame as docs/protocol.md lays it out.
pub fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
    [&header(kind, flags, payload.len() as u32), payload].concat()
}

/// A header that claims `length` bytes of payload, whatever comes.
pub fn header(kind: u8, flags: u8, length: u32) -> Vec<u8> {
    [&[kind, flags, 0, 0][..], &length.to_le_bytes()].concat()
}

pub const HELLO: u8 = 0x01;
pub const WELCOME: u8 = 0x02;
pub const OPEN: u8 = 0x03;
pub const OPENED: u8 = 0x04;
pub const FAILED: u8 = 0x05;
pub const LANE: u8 = 0x06;
pub const READ: u8 = 0x10;
pub const DATA: u8 = 0x11;
pub const WRITE: u8 = 0x12;
pub const DONE: u8 = 0x14;
pub const PULL: u8 = 0x20;
pub const CREDIT: u8 = 0x21;
pub const END: u8 = 0x22;
pub const TAKE: u8 = 0x30;
pub const FEED: u8 = 0x3b;

pub const ZERO: u8 = 0;
pub const RAW: u8 = 1;
pub const LZ4: u8 = 2;

pub fn hello(version: u16) -> Vec<u8> {
    frame(HELLO, 0, &[&version.to_le_bytes()[..], &[4], b"test"].concat())
}

pub fn open(name: &str) -> Vec<u8> {
    frame(OPEN, 0, &[&[name.len() as u8], name.as_bytes()].concat())
}

/// Class 2 is demand.
pub fn lane(class: u8) -> Vec<u8> {
    frame(LANE, 0, &[class])
}

pub fn read(region: u32, first: u64, count: u32) -> Vec<u8> {
    frame(READ, 0, &[&region.to_le_bytes()[..], &count.to_le_bytes(), &first.to_le_bytes()].concat())
}

pub fn write(region: u32, first: u64, count: u32, encoding: u8, content: &[u8]) -> Vec<u8> {
    frame(WRITE, encoding, &[&region.to_le_bytes()[..], &count.to_le_bytes(), &first.to_le_bytes(), content].concat())
}

pub fn pull(region: u32, credit_bytes: u64, extents: &[(u64, u64)]) -> Vec<u8> {
    let mut payload = [&region.to_le_bytes()[..], &(extents.len() as u32).to_le_bytes(), &credit_bytes.to_le_bytes()].concat();
    for (first, count) in extents {
        payload.extend_from_slice(&first.to_le_bytes());
        payload.extend_from_slice(&count.to_le_bytes());
    }
    frame(PULL, 0, &payload)
}

pub fn feed(session: u128, epoch: u64, region: u32, credit_bytes: u64) -> Vec<u8> {
    let turn = [&session.to_le_bytes()[..], &epoch.to_le_bytes()].concat();
    frame(FEED, 0, &[&turn[..], &region.to_le_bytes(), &credit_bytes.to_le_bytes()].concat())
}

pub fn credit(total_bytes: u64) -> Vec<u8> {
    frame(CREDIT, 0, &total_bytes.to_le_bytes())
}

pub fn welcome() -> Vec<u8> {
    frame(WELCOME, 0, &[1, 0, 4, b't', b'e', b's', b't'])
}

pub fn opened(region: u32, size_bytes: u64) -> Vec<u8> {
    frame(OPENED, 0, &[&region.to_le_bytes()[..], &[1, 12, 0, 0], &size_bytes.to_le_bytes()].concat())
}

pub fn data(first: u64, count: u32, encoding: u8, content: &[u8]) -> Vec<u8> {
    frame(DATA, encoding, &[&count.to_le_bytes()[..], &[0; 4], &first.to_le_bytes(), content].concat())
}

/// The pages of an extent as one raw DATA frame with the world's bytes.
pub fn honest_data(extent: Extent) -> Vec<u8> {
    data(extent.first(), extent.count() as u32, RAW, contents(extent))
}

/// A frame as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Got {
    pub kind: u8,
    pub flags: u8,
    pub payload: Vec<u8>,
}

impl Got {
    /// The next frame; `None` when the stream or the connection ended before it was whole.
    pub async fn read(stream: &mut quinn::RecvStream) -> Option<Got> {
        let mut header = [0; 8];
        stream.read_exact(&mut header).await.ok()?;
        let [kind, flags, _, _, l0, l1, l2, l3] = header;
        let mut payload = vec![0; u32::from_le_bytes([l0, l1, l2, l3]) as usize];
        stream.read_exact(&mut payload).await.ok()?;
        Some(Got { kind, flags, payload })
    }

    /// The code of a FAILED.
    pub fn code(&self) -> Option<u16> {
        (self.kind == FAILED).then(|| u16::from_le_bytes([self.payload[0], self.payload[1]]))
    }

    /// The text of a FAILED.
    pub fn message(&self) -> &str {
        std::str::from_utf8(&self.payload[4..]).unwrap()
    }

    pub fn u32_at(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.payload[at..at + 4].try_into().unwrap())
    }

    pub fn u64_at(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.payload[at..at + 8].try_into().unwrap())
    }

    /// The extent of a READ or DATA.
    pub fn extent(&self) -> Extent {
        let count = self.u32_at(if self.kind == READ { 4 } else { 0 });
        Extent::new(self.u64_at(8), count.into()).unwrap()
    }
}

fn certified(identity: &Identity) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let pem = identity.to_pem();
    let chain = CertificateDer::pem_slice_iter(pem.as_bytes()).map(Result::unwrap).collect();
    (chain, PrivateKeyDer::from_pem_slice(pem.as_bytes()).unwrap())
}

/// A client's connection on which a test says what it likes.
pub struct RawClient {
    pub connection: quinn::Connection,
    /// Ends the connection when dropped.
    _endpoint: quinn::Endpoint,
}

impl RawClient {
    pub async fn connect(address: SocketAddr, identity: Option<&Identity>) -> Result<RawClient, quinn::ConnectionError> {
        RawClient::connect_as(address, identity, b"pageferry/1").await
    }

    pub async fn connect_as(
        address: SocketAddr,
        identity: Option<&Identity>,
        alpn: &[u8],
    ) -> Result<RawClient, quinn::ConnectionError> {
        let config = rustls::ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyServer));
        let mut config = match identity.map(certified) {
            Some((chain, key)) => config.with_client_auth_cert(chain, key).unwrap(),
            None => config.with_no_client_auth(),
        };
        config.alpn_protocols = vec![alpn.to_vec()];
        let crypto: quinn::crypto::rustls::QuicClientConfig = config.try_into().unwrap();
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        let mut transport = quinn::TransportConfig::default();
        transport.keep_alive_interval(Some(Duration::from_secs(2)));
        config.transport_config(Arc::new(transport));
        let mut endpoint = quinn::Endpoint::client(LOOPBACK).unwrap();
        endpoint.set_default_client_config(config);
        let connection = endpoint.connect(address, "any").unwrap().await?;
        Ok(RawClient { connection, _endpoint: endpoint })
    }

    /// A new stream on which `bytes` were sent.
    pub async fn stream(&self, bytes: &[u8]) -> (quinn::SendStream, quinn::RecvStream) {
        let (mut send, receive) = soon("opening a stream", self.connection.open_bi()).await.unwrap();
        // Fails only when the server has already closed the connection, which the test looks at next.
        let _ = send.write_all(bytes).await;
        (send, receive)
    }

    /// Sends `bytes` on a new stream, ends it, and returns all frames that come back.
    pub async fn say(&self, bytes: &[u8]) -> Vec<Got> {
        // Refused before it could say anything: nothing comes back.
        let Ok((mut send, mut receive)) = soon("opening a stream", self.connection.open_bi()).await else { return Vec::new() };
        let _ = send.write_all(bytes).await;
        let _ = send.finish();
        let mut answers = Vec::new();
        while let Some(got) = soon("an answer", Got::read(&mut receive)).await {
            answers.push(got);
        }
        answers
    }

    /// Says HELLO, opens a region and returns its number.
    pub async fn open(&self, name: &str) -> u32 {
        let answers = self.say(&[hello(1), open(name)].concat()).await;
        assert_eq!(answers.iter().map(|got| got.kind).collect::<Vec<_>>(), [WELCOME, OPENED], "{answers:?}");
        answers[1].u32_at(0)
    }

    /// Waits until the server closes the connection and returns its code.
    pub async fn closed(&self) -> Option<u64> {
        match soon("the close", self.connection.closed()).await {
            quinn::ConnectionError::ApplicationClosed(close) => Some(close.error_code.into_inner()),
            _ => None,
        }
    }
}

/// Lets every server in.
#[derive(Debug)]
struct AnyServer;

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2".into()))
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        default_provider().signature_verification_algorithms.supported_schemes()
    }
}

/// A stream at a [`Liar`]: the frame that opened it was read.
pub struct Asked {
    pub connection: quinn::Connection,
    /// How many connections there were before this one.
    pub number: usize,
    pub first: Got,
    pub send: quinn::SendStream,
    pub receive: quinn::RecvStream,
}

impl Asked {
    /// The next frame; waits for ever when the client says no more, for a script that ends must not end its stream.
    pub async fn next(&mut self) -> Got {
        match Got::read(&mut self.receive).await {
            Some(got) => got,
            None => std::future::pending().await,
        }
    }

    pub async fn say(&mut self, bytes: &[u8]) {
        // The client may have left, as it should.
        let _ = self.send.write_all(bytes).await;
    }

    /// Answers every OPEN on the control stream as a server of so many pages would.
    pub async fn control(mut self, pages: u64) {
        self.say(&welcome()).await;
        loop {
            assert_eq!(self.next().await.kind, OPEN);
            self.say(&opened(1, pages * PAGE as u64)).await;
        }
    }

    /// Answers requests on a lane, or a pull, with the world's pages.
    pub async fn honest(mut self) {
        if self.first.kind == PULL {
            for at in (16..self.first.payload.len()).step_by(16) {
                let extent = Extent::new(self.first.u64_at(at), self.first.u64_at(at + 8)).unwrap();
                for part in extent.chunks(64) {
                    self.say(&honest_data(part)).await;
                }
            }
            return self.say(&frame(END, 0, &[])).await;
        }
        loop {
            let got = self.next().await;
            let answer = if got.kind == READ { honest_data(got.extent()) } else { frame(DONE, 0, &[]) };
            self.say(&answer).await;
        }
    }
}

/// A server with the right key that says what a test tells it to. Closes when dropped.
pub struct Liar {
    pub address: SocketAddr,
    endpoint: quinn::Endpoint,
}

impl Liar {
    /// `script` plays each stream.
    pub fn start<F>(identity: &Identity, script: impl Fn(Asked) -> F + Send + Sync + 'static) -> Liar
    where
        F: Future<Output = ()> + Send + 'static,
    {
        Liar::start_with(identity, quinn::TransportConfig::default(), script)
    }

    pub fn start_with<F>(
        identity: &Identity,
        transport: quinn::TransportConfig,
        script: impl Fn(Asked) -> F + Send + Sync + 'static,
    ) -> Liar
    where
        F: Future<Output = ()> + Send + 'static,
    {
        // The first use makes the world, which takes longer than some answer time-outs.
        contents(Extent::page(0));
        let (chain, key) = certified(identity);
        let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        config.alpn_protocols = vec![b"pageferry/1".to_vec()];
        let crypto: quinn::crypto::rustls::QuicServerConfig = config.try_into().unwrap();
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        config.transport_config(Arc::new(transport));
        let endpoint = quinn::Endpoint::server(config, LOOPBACK).unwrap();
        let address = endpoint.local_addr().unwrap();
        tokio::spawn(accept(endpoint.clone(), Arc::new(script)));
        Liar { address, endpoint }
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.endpoint.close(0u32.into(), b"");
    }
}

async fn accept<F>(endpoint: quinn::Endpoint, script: Arc<impl Fn(Asked) -> F + Send + Sync + 'static>)
where
    F: Future<Output = ()> + Send + 'static,
{
    for number in 0.. {
        let Some(incoming) = endpoint.accept().await else { return };
        let script = script.clone();
        tokio::spawn(async move {
            let Ok(connection) = incoming.await else { return };
            while let Ok((send, mut receive)) = connection.accept_bi().await {
                let (connection, script) = (connection.clone(), script.clone());
                tokio::spawn(async move {
                    let Some(first) = Got::read(&mut receive).await else { return };
                    script(Asked { connection, number, first, send, receive }).await;
                });
            }
        });
    }
}

/// Pulls everything that `extents` name and returns the runs.
pub async fn pull_all(store: &impl PageStore, extents: Vec<Extent>) -> Vec<Run> {
    let mut pull = store.pull(extents).await.unwrap();
    let mut runs = Vec::new();
    while let Some(run) = soon("a run of a pull", pull.next()).await.unwrap() {
        runs.push(run);
    }
    runs
}
