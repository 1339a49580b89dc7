//! Baseline: what the two kernels' UDP stacks and wake-ups cost, without QUIC.
//!
//! Role: ping-pong of 16 bytes out and a page back, blocking calls at both ends. Neighbours: bench `fault_latency`. Invariants: the page that comes
//! back is the one asked for, checked by a word of it.

use super::{
    PAGE_BYTES, Result,
    far_end::{FarEnd, answer, field},
    measure::Times,
    pages::Image,
};
use serde_json::{Value, json};
use std::{
    net::UdpSocket,
    time::{Duration, Instant},
};

/// The role of the end that answers.
pub const ROLE: &str = "udp";

/// The end that asks.
pub struct PingPong {
    socket: UdpSocket,
    /// Ends with this.
    _far_end: FarEnd,
}

impl PingPong {
    pub fn start(bytes: u64, seed: u64) -> Result<PingPong> {
        let mut far_end = FarEnd::start(ROLE)?;
        let listening = far_end.ask(&json!({ "ask": "listen", "bytes": bytes, "seed": seed }))?;
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        socket.connect(field(&listening, "address", Value::as_str)?)?;
        socket.set_read_timeout(Some(Duration::from_secs(5)))?;
        Ok(PingPong { socket, _far_end: far_end })
    }

    /// Asks for each page and times the round trip.
    pub fn fetch(&self, image: &Image, order: &[u64]) -> Result<Times> {
        let mut times = Times::with_capacity(order.len());
        let mut request = [0; 16];
        let mut reply = [0; PAGE_BYTES as usize];
        for page in order {
            request[..8].copy_from_slice(&page.to_le_bytes());
            let start = Instant::now();
            self.socket.send(&request)?;
            let len = self.socket.recv(&mut reply).map_err(|error| format!("no answer within 5 s: {error}"))?;
            times.since(start);
            let (at, wanted) = image.probe(*page);
            if len != reply.len() || reply[at * 8..][..8] != wanted.to_ne_bytes() {
                return Err(format!("{len} wrong bytes came back for page {page}").into());
            }
        }
        Ok(times)
    }
}

/// The end that answers.
pub fn far_end() -> Result<()> {
    answer(|_, question| {
        let (bytes, seed) = (field(question, "bytes", Value::as_u64)?, field(question, "seed", Value::as_u64)?);
        let pages = Image::incompressible(bytes, seed).bytes();
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        let address = socket.local_addr()?.to_string();
        std::thread::spawn(move || {
            let mut request = [0; 16];
            while let Ok((16, from)) = socket.recv_from(&mut request) {
                let mut page = [0; 8];
                page.copy_from_slice(&request[..8]);
                let offset = (u64::from_le_bytes(page) * PAGE_BYTES) as usize;
                let Some(page) = pages.get(offset..offset + PAGE_BYTES as usize) else { break };
                if socket.send_to(page, from).is_err() {
                    break;
                }
            }
        });
        Ok(json!({ "address": address }))
    })
}
