//! The regions of a peer as stores.
//!
//! Role: hops *request* and *reply*: turns reads, writes and pulls into requests. Neighbours: a pager reads it; `peer` has the connection, `lane` and
//! `pull` carry the requests. Invariants: a connection that was lost is dialled again, and the region opened again, by the next request; a region that
//! came back with another size is an error, never other pages.

use super::{
    peer::{Inner, Link, Opened, Peer},
    pull::RemotePull,
    stream::{FrameReader, FrameWriter},
    wire::{Access, Class, EncodedRun, Frame, Name, PullExtents, RunExtent},
};
use crate::{Extent, NetError, PageSize, PageStore, Pull, ReadAfterRead, Run, StoreError};
use async_trait::async_trait;
use bytes::Bytes;
use std::sync::Arc;

/// A region of a peer as a [`PageStore`]: pages come over QUIC, from a connection that is dialled again when it is lost.
///
/// See [`Peer::open`].
#[derive(Clone, Debug)]
pub struct RemoteStore {
    peer: Peer,
    name: Name,
    page: PageSize,
    size_bytes: u64,
}

/// How much one READ asks for.
const READ_MAX_BYTES: u64 = 1 << 20;

/// A lane may end before it writes a request, with its connection or alone; one that never gets to it has no thread to do so any more.
const TRIES_MAX: usize = 4;

impl RemoteStore {
    pub(super) fn new(peer: Peer, name: Name, opened: Opened) -> RemoteStore {
        RemoteStore { peer, name, page: opened.page, size_bytes: opened.size_bytes }
    }

    /// The peer it belongs to.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    fn unreachable(&self, error: NetError) -> StoreError {
        match error {
            NetError::Refused { code, message } => StoreError::Refused { code, message },
            NetError::Protocol(what) => StoreError::Protocol(what),
            other => self.peer.inner.setting.away(other.to_string()),
        }
    }

    /// The connection, and this region on it.
    async fn opened(&self) -> Result<(Arc<Link>, Opened), StoreError> {
        if let Some(link) = self.peer.inner.live()
            && let Some(opened) = link.opened(&self.name)
        {
            return Ok((link, opened));
        }
        let name = self.name.clone();
        let work = |inner: Arc<Inner>| async move {
            let link = inner.link().await?;
            let opened = link.open(&inner, &name).await?;
            Ok((link, opened))
        };
        let (link, opened) = self.peer.on_service(work).await.map_err(|error| self.unreachable(error))?;
        if opened.size_bytes != self.size_bytes || opened.page != self.page {
            return Err(StoreError::Protocol(format!(
                "region {:?} has {} bytes now and had {} when it was opened",
                &**self.name, opened.size_bytes, self.size_bytes
            )));
        }
        Ok((link, opened))
    }

    /// A new stream of the connection, the region's number on it and the credit that bulk gets.
    pub(super) async fn stream(&self) -> Result<(FrameWriter, FrameReader, u32, u64), NetError> {
        let name = self.name.clone();
        let work = |inner: Arc<Inner>| async move {
            let link = inner.link().await?;
            let opened = link.open(&inner, &name).await?;
            let (writer, reader) = link.stream(&inner).await?;
            Ok((writer, reader, opened.region, u64::from(inner.options.stream_window_bytes)))
        };
        self.peer.on_service(work).await
    }

    async fn read_class(&self, extent: Extent, class: Class) -> Result<Vec<Run>, StoreError> {
        self.check(extent)?;
        let mut runs = Vec::new();
        for part in extent.chunks(READ_MAX_BYTES / self.page.bytes()) {
            let extent = RunExtent::new(part).map_err(|error| StoreError::Protocol(error.to_string()))?;
            let answer = self.ask(class, Some(part), |opened| Ok(Frame::Read { region: opened.region, extent })).await?;
            if runs.is_empty() {
                runs = answer;
            } else {
                runs.extend(answer);
            }
        }
        Ok(runs)
    }

    /// Has one request answered, by a lane that carries it whole.
    async fn ask(
        &self,
        class: Class,
        extent: Option<Extent>,
        request: impl Fn(Opened) -> Result<Frame, StoreError>,
    ) -> Result<Vec<Run>, StoreError> {
        let setting = &self.peer.inner.setting;
        for _ in 0..TRIES_MAX {
            let (link, opened) = self.opened().await?;
            let answer = link.ask(setting, class, request(opened)?, extent, self.page);
            if let Some(answer) = answer.await {
                return answer;
            }
        }
        Err(setting.away("no stream carries requests"))
    }
}

#[async_trait]
impl PageStore for RemoteStore {
    fn size(&self) -> u64 {
        self.size_bytes
    }

    fn page_size(&self) -> PageSize {
        self.page
    }

    async fn read(&self, extent: Extent) -> Result<Vec<Run>, StoreError> {
        self.read_class(extent, Class::Demand).await
    }

    async fn read_behind(&self, extent: Extent) -> Result<Vec<Run>, StoreError> {
        self.read_class(extent, Class::Behind).await
    }

    async fn write(&self, extent: Extent, bytes: &[u8]) -> Result<(), StoreError> {
        self.check_write(extent, bytes)?;
        let page_len = self.page.len();
        for part in extent.chunks(READ_MAX_BYTES / self.page.bytes()) {
            #[allow(clippy::cast_possible_truncation, reason = "inside `bytes`, whose length was checked against the extent")]
            let (from, len) = ((part.first() - extent.first()) as usize * page_len, part.count() as usize * page_len);
            let content = crate::Content::Bytes(Bytes::copy_from_slice(&bytes[from..from + len]));
            let (encoding, content) = super::codec::encode_run(content, self.peer.inner.options.compress);
            let run = EncodedRun::new(part, encoding, content).map_err(|error| StoreError::Protocol(error.to_string()))?;
            let request = |opened: Opened| match opened.access {
                Access::Read => Err(StoreError::ReadOnly),
                Access::ReadWrite => Ok(Frame::Write { region: opened.region, run: run.clone() }),
            };
            self.ask(Class::Background, None, request).await?;
        }
        Ok(())
    }

    async fn flush(&self) -> Result<(), StoreError> {
        self.ask(Class::Background, None, |opened| Ok(Frame::Flush { region: opened.region })).await.map(|_| ())
    }

    async fn pull(&self, extents: Vec<Extent>) -> Result<Box<dyn Pull>, StoreError> {
        extents.iter().try_for_each(|extent| self.check(*extent))?;
        let Ok(listed) = PullExtents::new(extents.clone()) else {
            // So fragmented that the list does not fit a frame: ask piece by piece.
            return Ok(Box::new(ReadAfterRead::new(self.clone(), extents)));
        };
        let (link, opened) = self.opened().await?;
        let (inner, setting) = (&self.peer.inner, self.peer.inner.setting.clone());
        let window_bytes = u64::from(inner.options.stream_window_bytes);
        let start = RemotePull::start(&link.connection, opened.region, listed, window_bytes, self.page, setting);
        Ok(Box::new(inner.setting.within("starting a bulk read", start).await??))
    }
}
