//! A timer that is finer than the runtime's.
//!
//! Role: wakes a task at an instant; tokio's own timers count in whole milliseconds, and a path in tens of microseconds. Neighbours: `net` delays datagrams by it;
//! `watch` watches its descriptor. Invariants: never done before its instant.

use super::watch::{OwnsDescriptor, watch};
use nix::sys::{
    time::TimeSpec,
    timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
};
use std::{
    io,
    os::fd::{AsFd, AsRawFd, RawFd},
    task::{Context, Poll, ready},
    time::Instant,
};
use tokio::io::{Interest, unix::AsyncFd};

/// See the module header.
#[derive(Debug)]
pub(crate) struct Timer {
    io: AsyncFd<Descriptor>,
    set_to: Option<Instant>,
}

#[derive(Debug)]
struct Descriptor(TimerFd);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl OwnsDescriptor for Descriptor {}

impl Timer {
    /// Called inside the runtime that shall be told.
    pub(crate) fn new() -> io::Result<Timer> {
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
        Ok(Timer { io: watch(Descriptor(timer), Interest::READABLE)?, set_to: None })
    }

    /// Done at that instant, which may be another each time: the last one asked for counts.
    pub(crate) fn poll_until(&mut self, at: Instant, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let left = at.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Poll::Ready(Ok(()));
            }
            if self.set_to != Some(at) {
                // Forgets what it told of before (timerfd_settime(2)), and tells the edge-triggered watch anew: nothing needs to be read.
                self.io.get_ref().0.set(Expiration::OneShot(TimeSpec::from_duration(left)), TimerSetTimeFlags::empty())?;
                self.set_to = Some(at);
            }
            ready!(self.io.poll_read_ready(cx))?.clear_ready();
            // That may have been for an earlier instant.
            self.set_to = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{future::poll_fn, time::Duration};

    #[tokio::test]
    async fn it_is_done_at_the_instant_asked_for_last() {
        let mut timer = Timer::new().unwrap();
        let start = Instant::now();
        // An earlier and a later one that nobody waits for any more.
        for ms in [1, 3_600_000] {
            let at = start + Duration::from_millis(ms);
            let pending = poll_fn(|cx| Poll::Ready(timer.poll_until(at, cx).is_pending())).await;
            assert!(pending || Instant::now() >= at);
        }
        for us in [3000, 3500, 20_000] {
            let at = start + Duration::from_micros(us);
            let done = poll_fn(|cx| timer.poll_until(at, cx));
            tokio::time::timeout(Duration::from_secs(10), done).await.unwrap().unwrap();
            assert!(Instant::now() >= at);
        }
    }
}
