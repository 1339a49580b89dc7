//! The UDP socket under a QUIC endpoint whose path is shaped.
//!
//! Role: hop *wire*, between quinn and `socket`, for tests and benches. Neighbours: `transport` opens it where a shape was asked for; `shaper` decides. Invariants:
//! everything runs on the endpoint's runtime (S2); it holds no more than [`WAY_MAX_BYTES`] in each direction; what was still under way when the endpoint ended leaves in
//! its time.
//!
//! Both directions pass here, so one end alone shapes them: what quinn sends waits in one line and what the kernel received in another.

use super::{
    shape::{LinkControl, LinkShape},
    shaper::{Direction, Line, Shaper},
    socket::QuicSocket,
};
use crate::sys::Timer;
use bytes::Bytes;
use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{EcnCodepoint, RecvMeta, Transmit},
};
use std::{
    future::poll_fn,
    io::{self, IoSliceMut},
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};
use tokio::{runtime::Handle, sync::Notify};

/// 10 Gbit/s for the 50 ms that each way of a round trip of 100 ms takes.
const WAY_MAX_BYTES: usize = 64 << 20;
/// So many batches are sent before other tasks of the thread have a turn: as much as quinn sends in one.
const SENDS_A_TURN: usize = 4;
/// So many batches are taken from the kernel, if nothing of them has arrived yet, before other tasks have a turn.
const RECEIVES_A_TURN: usize = 8;

/// See the module header.
#[derive(Debug)]
pub(super) struct ShapedSocket {
    outgoing: Arc<Outgoing>,
    incoming: Mutex<Incoming>,
}

/// What the task that sends shares with those that hand datagrams in.
#[derive(Debug)]
struct Outgoing {
    socket: Arc<QuicSocket>,
    way: Mutex<Way>,
    /// Something is under way, or nothing will be any more.
    more: Notify,
    closed: AtomicBool,
}

#[derive(Debug)]
struct Incoming {
    way: Way,
    timer: Timer,
}

/// One direction.
#[derive(Debug)]
struct Way {
    shaper: Shaper,
    line: Line<Datagram>,
    control: LinkControl,
    began: Instant,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Datagram {
    contents: Bytes,
    envelope: Envelope,
}

/// All that quinn knows of a datagram beside its contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Envelope {
    remote: SocketAddr,
    /// This end's address.
    local: Option<IpAddr>,
    ecn: Option<EcnCodepoint>,
}

impl ShapedSocket {
    /// The shape was checked; `handle` is of the runtime that `socket` is on.
    pub(super) fn new(socket: QuicSocket, shape: &LinkShape, handle: &Handle) -> io::Result<ShapedSocket> {
        let began = Instant::now();
        let way = |direction| Way {
            shaper: Shaper::new(shape, direction),
            line: Line::new(WAY_MAX_BYTES),
            control: shape.control.clone(),
            began,
        };
        let (sends, receives) = {
            let _context = handle.enter();
            (Timer::new()?, Timer::new()?)
        };
        let outgoing = Arc::new(Outgoing {
            socket: Arc::new(socket),
            way: Mutex::new(way(Direction::Outgoing)),
            more: Notify::new(),
            closed: AtomicBool::new(false),
        });
        handle.spawn(send_in_time(outgoing.clone(), sends));
        Ok(ShapedSocket { outgoing, incoming: Mutex::new(Incoming { way: way(Direction::Incoming), timer: receives }) })
    }
}

impl Drop for ShapedSocket {
    fn drop(&mut self) {
        self.outgoing.closed.store(true, Relaxed);
        self.outgoing.more.notify_one();
    }
}

impl AsyncUdpSocket for ShapedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(AlwaysRoom)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let envelope = Envelope { remote: transmit.destination, local: transmit.src_ip, ecn: transmit.ecn };
        let segment = transmit.segment_size.unwrap_or(transmit.contents.len());
        lock(&self.outgoing.way).enter(transmit.contents, segment, envelope);
        self.outgoing.more.notify_one();
        Ok(())
    }

    fn poll_recv(&self, cx: &mut Context<'_>, bufs: &mut [IoSliceMut<'_>], meta: &mut [RecvMeta]) -> Poll<io::Result<usize>> {
        let Incoming { way, timer } = &mut *lock(&self.incoming);
        for _ in 0..RECEIVES_A_TURN {
            let received = match self.outgoing.socket.poll_recv(cx, bufs, meta) {
                Poll::Ready(received) => received?,
                Poll::Pending => 0,
            };
            for (buf, meta) in bufs.iter().zip(&*meta).take(received) {
                let envelope = Envelope { remote: meta.addr, local: meta.dst_ip, ecn: meta.ecn };
                way.enter(&buf[..meta.len], meta.stride, envelope);
            }
            let arrived = way.arrive(bufs, meta);
            if arrived > 0 {
                return Poll::Ready(Ok(arrived));
            }
            if received > 0 {
                continue; // the kernel may have more, and has promised no wake-up yet
            }
            let Some(at) = way.next_at() else { return Poll::Pending };
            match timer.poll_until(at, cx) {
                Poll::Ready(done) => done?,
                Poll::Pending => return Poll::Pending,
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.outgoing.socket.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.outgoing.socket.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.outgoing.socket.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.outgoing.socket.may_fragment()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Way {
    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// A batch of datagrams, each but the last of `segment` bytes, as quinn and the kernel hand them over.
    fn enter(&mut self, batch: &[u8], segment: usize, envelope: Envelope) {
        let (now, cut) = (self.now(), self.control.is_cut());
        for contents in batch.chunks(segment.max(1)) {
            let arrivals = self.shaper.send(contents.len(), now, cut);
            // A copy of each, not a slice of a copy of all: one that waits must not keep the others' memory.
            let datagram = Datagram { contents: Bytes::copy_from_slice(contents), envelope };
            let mut kept = false;
            for at in arrivals.into_iter().flatten() {
                kept |= self.line.push(at, contents.len(), datagram.clone());
            }
            if !kept {
                self.control.count_dropped();
            }
        }
    }

    /// The next that arrives, if it has and `fits`.
    fn next_if(&mut self, fits: impl Fn(&Datagram) -> bool) -> Option<Datagram> {
        let now = self.now();
        loop {
            let datagram = self.line.pop_if(now, &fits)?;
            if !self.control.is_cut() && !self.shaper.is_cut(now) {
                self.control.count_passed();
                return Some(datagram);
            }
            self.control.count_dropped();
        }
    }

    fn next_at(&self) -> Option<Instant> {
        self.line.next_at().map(|at| self.began + at)
    }

    /// What has arrived by now of one size and envelope, as one batch for the kernel to cut again (UDP_SEGMENT, udp(7)); `batch` is where it lies.
    fn leave(&mut self, segments_max: usize, batch: &mut Vec<u8>) -> Option<(usize, Envelope)> {
        let Datagram { contents, envelope } = self.next_if(|_| true)?;
        let segment = contents.len();
        batch.clear();
        batch.extend_from_slice(&contents);
        for _ in 1..segments_max {
            let Some(next) = self.next_if(|next| next.envelope == envelope && next.contents.len() == segment) else { break };
            batch.extend_from_slice(&next.contents);
        }
        Some((segment, envelope))
    }

    /// Puts what has arrived into quinn's buffers, those of one size and sender together, as the kernel does (UDP_GRO, udp(7)); how many buffers that fills.
    fn arrive(&mut self, bufs: &mut [IoSliceMut<'_>], meta: &mut [RecvMeta]) -> usize {
        let mut filled = 0;
        for (buf, meta) in bufs.iter_mut().zip(meta) {
            let Some(Datagram { contents, envelope }) = self.next_if(|_| true) else { break };
            // One that is too long loses its end, as it does in the kernel.
            let stride = contents.len().min(buf.len());
            buf[..stride].copy_from_slice(&contents[..stride]);
            let mut len = stride;
            let end = buf.len();
            let alike = |next: &Datagram, len| next.envelope == envelope && next.contents.len() == stride && len + stride <= end;
            while let Some(next) = self.next_if(|next| alike(next, len)) {
                buf[len..len + stride].copy_from_slice(&next.contents);
                len += stride;
            }
            let Envelope { remote, local, ecn } = envelope;
            *meta = RecvMeta { addr: remote, len, stride, ecn, dst_ip: local };
            filled += 1;
        }
        filled
    }
}

/// Sends what is under way, each datagram in its time, until nothing is and the endpoint has ended.
async fn send_in_time(outgoing: Arc<Outgoing>, mut timer: Timer) {
    let mut room = outgoing.socket.clone().create_io_poller();
    let segments_max = outgoing.socket.max_transmit_segments();
    let mut batch = Vec::new();
    loop {
        for _ in 0..SENDS_A_TURN {
            let Some((segment, envelope)) = lock(&outgoing.way).leave(segments_max, &mut batch) else { break };
            while send(&outgoing.socket, &batch, segment, envelope).is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
                if poll_fn(|cx| room.as_mut().poll_writable(cx)).await.is_err() {
                    return; // the runtime ends
                }
            }
        }
        let next_at = lock(&outgoing.way).next_at();
        match next_at {
            Some(at) if at <= Instant::now() => tokio::task::yield_now().await,
            Some(at) => {
                let arrived = tokio::select! {
                    arrived = poll_fn(|cx| timer.poll_until(at, cx)) => arrived,
                    () = outgoing.more.notified() => Ok(()),
                };
                if let Err(error) = arrived {
                    tracing::debug!(%error, "the timer of a shaped link failed");
                    return;
                }
            }
            None if outgoing.closed.load(Relaxed) => return,
            None => outgoing.more.notified().await,
        }
    }
}

fn send(socket: &QuicSocket, batch: &[u8], segment: usize, envelope: Envelope) -> io::Result<()> {
    let Envelope { remote, local, ecn } = envelope;
    let segment_size = (batch.len() > segment).then_some(segment);
    socket.try_send(&Transmit { destination: remote, ecn, contents: batch, segment_size, src_ip: local })
}

/// A link takes what comes, and drops what it has no room for.
#[derive(Debug)]
struct AlwaysRoom;

impl UdpPoller for AlwaysRoom {
    fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::{super::transport::PrivateRuntime, *};
    use std::net::UdpSocket;

    fn way(shape: &LinkShape) -> Way {
        Way {
            shaper: Shaper::new(shape, Direction::Incoming),
            line: Line::new(WAY_MAX_BYTES),
            control: shape.control.clone(),
            began: Instant::now(),
        }
    }

    fn of(port: u16) -> Envelope {
        Envelope { remote: ([127, 0, 0, 1], port).into(), local: None, ecn: None }
    }

    /// What arrives, into `count` buffers of 1000 bytes: from which port, and the contents.
    fn arrived(way: &mut Way, count: usize) -> Vec<(u16, Vec<Vec<u8>>)> {
        let (mut memory, mut meta) = (vec![[0; 1000]; count], vec![RecvMeta::default(); count]);
        let mut bufs: Vec<IoSliceMut> = memory.iter_mut().map(|buf| IoSliceMut::new(buf)).collect();
        let filled = way.arrive(&mut bufs, &mut meta);
        let read = |(buf, meta): (&[u8; 1000], &RecvMeta)| {
            (meta.addr.port(), buf[..meta.len].chunks(meta.stride).map(<[u8]>::to_vec).collect())
        };
        memory.iter().zip(&meta).take(filled).map(read).collect()
    }

    #[test]
    fn datagrams_of_one_size_and_sender_share_a_buffer_and_stay_in_order() {
        let mut way = way(&LinkShape::default());
        way.enter(&[[1; 300], [2; 300], [3; 300], [4; 300]].concat(), 300, of(1));
        way.enter(&[5; 300], 300, of(2));
        way.enter(&[6; 500], 300, of(2));
        assert_eq!(arrived(&mut way, 1), [(1, vec![vec![1; 300], vec![2; 300], vec![3; 300]])]);
        let rest = [(1, vec![vec![4; 300]]), (2, vec![vec![5; 300], vec![6; 300]]), (2, vec![vec![6; 200]])];
        assert_eq!(arrived(&mut way, 9), rest);
        assert_eq!((way.control.passed(), way.control.dropped()), (7, 0));
    }

    #[test]
    fn datagrams_of_one_size_and_destination_leave_together_and_in_order() {
        let mut way = way(&LinkShape::default());
        way.enter(&[[1; 300], [2; 300], [3; 300]].concat(), 300, of(1));
        way.enter(&[4; 200], 300, of(1));
        way.enter(&[5; 200], 300, of(2));
        let mut left = Vec::new();
        let mut batch = Vec::new();
        while let Some((segment, envelope)) = way.leave(2, &mut batch) {
            left.push((envelope.remote.port(), batch.chunks(segment).map(|datagram| (datagram[0], datagram.len())).collect()));
        }
        let expected: [(u16, Vec<(u8, usize)>); 4] =
            [(1, vec![(1, 300), (2, 300)]), (1, vec![(3, 300)]), (1, vec![(4, 200)]), (2, vec![(5, 200)])];
        assert_eq!(left, expected);
    }

    #[test]
    fn what_should_have_arrived_while_the_link_was_cut_is_lost() {
        let mut way = way(&LinkShape::default());
        way.enter(&[1; 100], 100, of(1));
        way.control.cut();
        way.enter(&[2; 100], 100, of(1));
        assert_eq!(arrived(&mut way, 9), []);
        way.control.mend();
        way.enter(&[3; 100], 100, of(1));
        assert_eq!(arrived(&mut way, 9), [(1, vec![vec![3; 100]])]);
        assert_eq!((way.control.passed(), way.control.dropped()), (1, 2));
    }

    #[test]
    fn a_link_holds_no_more_than_it_may_however_much_is_sent() {
        let mut way = way(&LinkShape { rtt: Duration::from_secs(60), ..LinkShape::default() });
        let batch = vec![7; 9000 * 7];
        let sent = 2 * WAY_MAX_BYTES / batch.len() * 7;
        (0..sent / 7).for_each(|_| way.enter(&batch, 9000, of(1)));
        let held = sent as u64 - way.control.dropped();
        assert!(held * 9000 <= WAY_MAX_BYTES as u64 && held * 9000 > WAY_MAX_BYTES as u64 / 10 * 9, "{held} of {sent}");
    }

    /// A batch is taken apart, arrives no sooner than it should, and arrives though its endpoint has ended meanwhile.
    #[test]
    fn what_is_under_way_when_the_endpoint_ends_leaves_in_its_time() {
        let service = crate::Service::start("test", Duration::ZERO).unwrap();
        let [from, to] = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        from.set_nonblocking(true).unwrap();
        to.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let shape = LinkShape { rtt: Duration::from_millis(40), ..LinkShape::default() };
        let socket = QuicSocket::new(from, 1452, &PrivateRuntime::of(&service)).unwrap();
        let socket = ShapedSocket::new(socket, &shape, service.handle()).unwrap();
        let start = Instant::now();
        let (destination, contents) = (to.local_addr().unwrap(), &[1; 2500]);
        socket.try_send(&Transmit { destination, ecn: None, contents, segment_size: Some(1000), src_ip: None }).unwrap();
        drop(socket);
        let lengths = [(); 3].map(|()| to.recv(&mut [0; 2000]).unwrap());
        assert!(lengths == [1000, 1000, 500] && start.elapsed() >= Duration::from_millis(20), "{lengths:?}");
    }
}
