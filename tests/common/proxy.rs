//! A path between two ends that a test can cut, in either direction, and spoil: datagrams lost, repeated, out of order.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
};
use tokio::{net::UdpSocket, sync::oneshot};

/// In percent of the datagrams.
#[derive(Clone, Copy, Default)]
pub struct Weather {
    pub lost: u64,
    pub repeated: u64,
    /// Arrive after the next.
    pub late: u64,
}

/// Forwards datagrams to `target`, from a thread of its own; until dropped.
pub struct Proxy {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    _stop: oneshot::Sender<()>,
}

struct Shared {
    target: SocketAddr,
    weather: Weather,
    random: AtomicU64,
    to_source: AtomicBool,
    to_destination: AtomicBool,
    /// Datagrams to the source leave from ports of their own after each change.
    changes: AtomicU64,
}

impl Proxy {
    pub fn start(target: SocketAddr) -> Proxy {
        Proxy::in_weather(target, Weather::default(), 0)
    }

    pub fn in_weather(target: SocketAddr, weather: Weather, seed: u64) -> Proxy {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let (on, random) = (|| AtomicBool::new(true), AtomicU64::new(seed));
        let (to_source, to_destination, changes) = (on(), on(), AtomicU64::new(0));
        let shared = Arc::new(Shared { target, weather, random, to_source, to_destination, changes });
        let (stop, stopped) = oneshot::channel();
        let forwarding = shared.clone();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                tokio::spawn(forward(register(socket), forwarding));
                let _ = stopped.await;
            });
        });
        Proxy { address, shared, _stop: stop }
    }

    /// From now on datagrams pass or vanish.
    pub fn to_source(&self, pass: bool) {
        self.shared.to_source.store(pass, SeqCst);
    }

    pub fn to_destination(&self, pass: bool) {
        self.shared.to_destination.store(pass, SeqCst);
    }

    /// As a NAT that was restarted: the source sees the destination at another port.
    pub fn change_port(&self) {
        self.shared.changes.fetch_add(1, SeqCst);
    }

    pub fn both(&self, pass: bool) {
        self.to_source(pass);
        self.to_destination(pass);
    }
}

impl Shared {
    fn percent(&self) -> u64 {
        // Splitmix64 of a counter: the same rolls for the same seed.
        let mut z = self.random.fetch_add(0x9E37_79B9_7F4A_7C15, SeqCst);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % 100
    }

    /// What leaves when `datagram` arrives.
    fn spoil(&self, datagram: &[u8], held: &mut Option<Vec<u8>>) -> Vec<Vec<u8>> {
        let datagram = datagram.to_vec();
        let Weather { lost, repeated, late } = self.weather;
        if self.percent() < lost {
            return Vec::new();
        }
        if held.is_none() && self.percent() < late {
            *held = Some(datagram);
            return Vec::new();
        }
        let again = (self.percent() < repeated).then(|| datagram.clone());
        [Some(datagram), again, held.take()].into_iter().flatten().collect()
    }
}

fn register(socket: std::net::UdpSocket) -> Arc<UdpSocket> {
    let buffers = socket2::SockRef::from(&socket);
    let _ = buffers.set_recv_buffer_size(4 << 20).and(buffers.set_send_buffer_size(4 << 20));
    socket.set_nonblocking(true).unwrap();
    Arc::new(UdpSocket::from_std(socket).unwrap())
}

async fn forward(socket: Arc<UdpSocket>, shared: Arc<Shared>) {
    let mut ways: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
    let (mut buffer, mut held, mut changes) = (vec![0; 1 << 16], None, 0);
    loop {
        let Ok((len, from)) = socket.recv_from(&mut buffer).await else { continue };
        let now = shared.changes.load(SeqCst);
        if now != changes {
            (changes, _) = (now, ways.clear());
        }
        if !shared.to_source.load(SeqCst) {
            continue;
        }
        let way = ways.entry(from).or_insert_with(|| {
            let way = register(std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
            tokio::spawn(back(way.clone(), socket.clone(), from, shared.clone()));
            way
        });
        for datagram in shared.spoil(&buffer[..len], &mut held) {
            let _ = way.send_to(&datagram, shared.target).await;
        }
    }
}

async fn back(way: Arc<UdpSocket>, socket: Arc<UdpSocket>, to: SocketAddr, shared: Arc<Shared>) {
    let (mut buffer, mut held) = (vec![0; 1 << 16], None);
    loop {
        // An error is that of a datagram sent before: nobody listens there.
        let Ok(len) = way.recv(&mut buffer).await else { continue };
        if !shared.to_destination.load(SeqCst) {
            continue;
        }
        for datagram in shared.spoil(&buffer[..len], &mut held) {
            let _ = socket.send_to(&datagram, to).await;
        }
    }
}
