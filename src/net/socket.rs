//! The UDP socket under a QUIC endpoint.
//!
//! Role: hop *wire*, between quinn and the kernel. Neighbours: `transport` opens it. Invariants: a batch of segments handed to the kernel stays under 64 KiB (a
//! larger one is dropped without an error); the thread is woken for datagrams that came, and for room to send only while a send waits for it.
//!
//! Why not quinn's own: it waits for both directions on one registration. The kernel reports room whenever a datagram has left and its memory is given back
//! (`sock_wfree`), so each request and each reply ended its sender's next wait for nothing: 3 us of a fault with all on one processor. And it
//! reads until the kernel says that there is nothing, where a batch that is not full says so already (recvmmsg(2)).

use super::transport::PrivateRuntime;
use crate::sys::watch;
use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{RecvMeta, Transmit, UdpSocketState},
};
use std::{
    fmt, io,
    net::{SocketAddr, UdpSocket},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    runtime::Handle,
};

/// One call may carry several datagrams of equal size (UDP_SEGMENT, udp(7)), but together less than a UDP packet's 65507 bytes: the kernel answers more
/// with EMSGSIZE, which quinn-udp takes for a lost packet.
const BATCH_MAX_BYTES: usize = 65_000;

/// See the module header.
#[derive(Debug)]
pub(super) struct QuicSocket {
    /// Registered for reading alone.
    io: AsyncFd<UdpSocket>,
    state: UdpSocketState,
    segments_max: usize,
    /// A send found no room, and nobody has seen any since.
    full: AtomicBool,
    handle: Handle,
}

impl QuicSocket {
    /// `mtu_max_bytes`: the largest datagram that will be sent.
    pub(super) fn new(socket: UdpSocket, mtu_max_bytes: u16, runtime: &PrivateRuntime) -> io::Result<QuicSocket> {
        let handle = runtime.handle().clone();
        let state = UdpSocketState::new((&socket).into())?;
        let io = {
            let _context = handle.enter();
            watch(socket, Interest::READABLE)?
        };
        let segments_max = state.max_gso_segments().min(segments_max(mtu_max_bytes));
        Ok(QuicSocket { io, state, segments_max, full: AtomicBool::new(false), handle })
    }
}

fn segments_max(mtu_max_bytes: u16) -> usize {
    BATCH_MAX_BYTES / usize::from(mtu_max_bytes)
}

impl AsyncUdpSocket for QuicSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Room { socket: self, waiting: None })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let sent = self.state.send(self.io.get_ref().into(), transmit);
        if sent.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
            self.full.store(true, Relaxed);
        }
        sent
    }

    fn poll_recv(&self, cx: &mut Context<'_>, bufs: &mut [io::IoSliceMut<'_>], meta: &mut [RecvMeta]) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.io.poll_read_ready(cx))?;
            match ready.try_io(|io| self.state.recv(io.get_ref().into(), bufs, meta)) {
                Ok(received) => {
                    // There was no more. What comes from now on makes the descriptor ready anew: its readiness is edge-triggered.
                    if received.as_ref().is_ok_and(|count| *count < bufs.len()) {
                        ready.clear_ready();
                    }
                    return Poll::Ready(received);
                }
                Err(_would_block) => {}
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.io.get_ref().local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.segments_max
    }

    fn max_receive_segments(&self) -> usize {
        self.state.gro_segments()
    }

    fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }
}

/// Waits for room to send, one connection's turn.
struct Room {
    socket: Arc<QuicSocket>,
    /// A registration of its own for writing, for as long as it is waited for; none before the first send was tried.
    waiting: Option<AsyncFd<UdpSocket>>,
}

impl fmt::Debug for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Room").field("waiting", &self.waiting.is_some()).finish_non_exhaustive()
    }
}

impl UdpPoller for Room {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.waiting.is_none() {
            if !self.socket.full.load(Relaxed) {
                return Poll::Ready(Ok(()));
            }
            let _context = self.socket.handle.enter();
            let same = self.socket.io.get_ref().try_clone()?;
            self.waiting = Some(watch(same, Interest::WRITABLE)?);
        }
        let Some(waiting) = &self.waiting else { return Poll::Ready(Ok(())) };
        let ready = ready!(waiting.poll_write_ready(cx)).map(drop);
        self.socket.full.store(false, Relaxed);
        self.waiting = None;
        Poll::Ready(ready)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::transport::{MTU_LIMIT_BYTES, MTU_MIN_BYTES},
        *,
    };

    #[test]
    fn a_batch_stays_below_the_largest_udp_packet() {
        for mtu_max_bytes in [MTU_MIN_BYTES, 1452, 6550, 6560, 8900, MTU_LIMIT_BYTES] {
            assert!(segments_max(mtu_max_bytes) * usize::from(mtu_max_bytes) <= 65_507);
        }
    }

    /// What a send that found no room waits for comes, and is not watched for any longer than that.
    #[tokio::test]
    async fn a_send_that_waits_for_room_is_told_of_it() {
        let service = crate::Service::start("test", std::time::Duration::ZERO).unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        let socket = Arc::new(QuicSocket::new(socket, 1452, &PrivateRuntime::of(&service)).unwrap());
        let mut room = Room { socket: socket.clone(), waiting: None };
        for full in [false, true, true] {
            socket.full.store(full, Relaxed);
            let writable = std::future::poll_fn(|context| Pin::new(&mut room).poll_writable(context));
            tokio::time::timeout(std::time::Duration::from_secs(10), writable).await.unwrap().unwrap();
            assert!(room.waiting.is_none() && !socket.full.load(Relaxed));
        }
    }
}
