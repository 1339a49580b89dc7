//! Streams the pages of a bulk read.
//!
//! Role: hop *serve* of the background pull. Neighbours: `serve` hands it the stream; `bulk` does the sending. Invariants: nothing is sent that was not asked for, and each
//! page at most once.

use super::{
    super::{
        lane::priority,
        stream::{FrameReader, FrameWriter, StreamError},
        wire::{Class, Frame},
    },
    Refusal, Session,
    bulk::BulkError,
    failed,
};
use crate::Extent;

impl Session {
    pub(super) async fn pull(
        &self,
        region: u32,
        credit_bytes: u64,
        extents: Vec<Extent>,
        writer: &mut FrameWriter,
        reader: FrameReader,
    ) -> Result<(), StreamError> {
        writer.prioritise(priority(Class::Background));
        let bulk = self.bulk(region, credit_bytes, reader);
        let checked = bulk.and_then(|bulk| {
            extents.iter().try_for_each(|extent| bulk.store().check(*extent))?;
            Ok(bulk)
        });
        let sent = match checked {
            Ok(mut bulk) => bulk.send(extents, writer).await,
            Err(refusal) => Err(BulkError::Refused(refusal)),
        };
        match sent {
            Ok(()) => writer.send(&Frame::End).await,
            Err(BulkError::Refused(Refusal(code, message))) => writer.send(&failed(code, &message)).await,
            Err(BulkError::Stream(error)) => Err(error),
        }
    }
}
