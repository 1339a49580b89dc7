//! Decisions: bytes to frames and back, docs/protocol.md; no I/O.
//!
//! Role: the only place that knows the layout of a frame. Neighbours: `net`'s streams read a [`Header`], then as many bytes as it
//! says, then [`Frame::decode`] them; the fields and limits are in [`fields`], the pages of DATA and WRITE in [`run`].
//! Invariants: a header is checked against the limits of its kind before anything is allocated (S7); decoding takes every byte of a
//! payload or fails; encoding cannot fail; what decodes encodes to the same bytes.

mod fields;
mod header;
mod run;
#[cfg(test)]
mod tests;

pub(crate) use fields::*;
pub(crate) use header::{Header, Kind};
pub(crate) use run::{DATA_FIELDS_BYTES, DataHead, EncodedRun, encode_data_head};

use crate::{Extent, PageSize};
use bytes::{BufMut, Bytes, BytesMut};
use fields::{Payload, count_of, run_extent};
use header::OFFER_ITEM_MIN_BYTES;

/// A region of an OFFER.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OfferedRegion {
    pub(crate) name: Name,
    pub(crate) page_size: PageSize,
    pub(crate) size_bytes: u64,
    /// Where the destination must map it, 0 for anywhere.
    pub(crate) address: u64,
}

/// A frame; docs/protocol.md says who sends which, and when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    /// The client's first frame on the control stream.
    Hello {
        version: u16,
        agent: Agent,
    },
    /// The server's answer: the version in force.
    Welcome {
        version: u16,
        agent: Agent,
    },
    Open {
        name: Name,
    },
    Opened {
        region: u32,
        access: Access,
        page_size: PageSize,
        size_bytes: u64,
    },
    Failed {
        code: ErrorCode,
        message: Message,
    },
    /// The first frame of a request stream.
    Lane {
        class: Class,
    },
    Read {
        region: u32,
        extent: RunExtent,
    },
    Data {
        serve_us: u32,
        run: EncodedRun,
    },
    Write {
        region: u32,
        run: EncodedRun,
    },
    Flush {
        region: u32,
    },
    Done,
    Pull {
        region: u32,
        credit_bytes: u64,
        extents: PullExtents,
    },
    Credit {
        total_bytes: u64,
    },
    End,
    Take {
        session: u128,
        plan: Plan,
    },
    Offer {
        session: u128,
        epoch: u64,
        state_bytes: StateLength,
        regions: OfferedRegions,
    },
    State {
        bytes: StatePiece,
    },
    Ready {
        session: u128,
        epoch: u64,
    },
    Commit {
        session: u128,
        epoch: u64,
    },
    Resumed {
        session: u128,
        epoch: u64,
    },
    Complete {
        session: u128,
        epoch: u64,
    },
    Released {
        session: u128,
        epoch: u64,
    },
    Abort {
        session: u128,
        epoch: u64,
        code: ErrorCode,
        message: Message,
    },
    /// The destination has mapped the regions offered.
    Mapped {
        session: u128,
        epoch: u64,
        /// The attempt that they were mapped for: they hold what it and those after it have brought.
        since: u64,
    },
    /// The program has paused; its state follows in STATE frames.
    Prepare {
        session: u128,
        epoch: u64,
        state_bytes: StateLength,
    },
    /// The first frame of a stream on which the source sends a region's pages as it sees fit.
    Feed {
        session: u128,
        epoch: u64,
        region: u32,
        credit_bytes: u64,
    },
    /// The pages of a feed's region whose content the destination does not have when the program is paused.
    Lacks {
        more: bool,
        extents: PullExtents,
    },
    /// How far copying is.
    Progress {
        session: u128,
        epoch: u64,
        copying: Copying,
    },
    /// A standby has all pages of this moment when each feed has brought its MARK; the state of it follows in STATE frames.
    Point {
        session: u128,
        epoch: u64,
        number: u64,
        /// How long ago the program stood there when this was sent, in microseconds.
        age_us: u64,
        state_bytes: StateLength,
    },
    /// What came on a feed up to here belongs to a point.
    Mark {
        number: u64,
    },
    /// The standby has a point whole, and is that far behind and no more.
    Kept {
        session: u128,
        epoch: u64,
        number: u64,
    },
    /// A standby asks for the program.
    Promote {
        session: u128,
        epoch: u64,
    },
    /// The first frame of a stream on which a standby says that it has taken over.
    Depose {
        session: u128,
        epoch: u64,
    },
    /// The source runs the program no more.
    Deposed {
        session: u128,
        epoch: u64,
    },
}

/// How far the copying of a running program is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Copying {
    /// From 1.
    pub(crate) round: u32,
    /// Of pages that the destination lacks.
    pub(crate) owed_bytes: u64,
    pub(crate) dirty_bytes_s: u64,
    pub(crate) bandwidth_bytes_s: u64,
    pub(crate) predicted_us: u64,
}

impl Frame {
    pub(crate) fn kind(&self) -> Kind {
        match self {
            Frame::Hello { .. } => Kind::Hello,
            Frame::Welcome { .. } => Kind::Welcome,
            Frame::Open { .. } => Kind::Open,
            Frame::Opened { .. } => Kind::Opened,
            Frame::Failed { .. } => Kind::Failed,
            Frame::Lane { .. } => Kind::Lane,
            Frame::Read { .. } => Kind::Read,
            Frame::Data { .. } => Kind::Data,
            Frame::Write { .. } => Kind::Write,
            Frame::Flush { .. } => Kind::Flush,
            Frame::Done => Kind::Done,
            Frame::Pull { .. } => Kind::Pull,
            Frame::Credit { .. } => Kind::Credit,
            Frame::End => Kind::End,
            Frame::Take { .. } => Kind::Take,
            Frame::Offer { .. } => Kind::Offer,
            Frame::State { .. } => Kind::State,
            Frame::Ready { .. } => Kind::Ready,
            Frame::Commit { .. } => Kind::Commit,
            Frame::Resumed { .. } => Kind::Resumed,
            Frame::Complete { .. } => Kind::Complete,
            Frame::Released { .. } => Kind::Released,
            Frame::Abort { .. } => Kind::Abort,
            Frame::Mapped { .. } => Kind::Mapped,
            Frame::Prepare { .. } => Kind::Prepare,
            Frame::Feed { .. } => Kind::Feed,
            Frame::Lacks { .. } => Kind::Lacks,
            Frame::Progress { .. } => Kind::Progress,
            Frame::Point { .. } => Kind::Point,
            Frame::Mark { .. } => Kind::Mark,
            Frame::Kept { .. } => Kind::Kept,
            Frame::Promote { .. } => Kind::Promote,
            Frame::Depose { .. } => Kind::Depose,
            Frame::Deposed { .. } => Kind::Deposed,
        }
    }

    /// Reads the payload that belongs to `header`. Content and state stay in `payload`'s buffer.
    ///
    /// # Errors
    /// [`WireError`] if a field is outside its limits, or the payload is shorter or longer than its fields.
    pub(crate) fn decode(header: Header, payload: Bytes) -> Result<Frame, WireError> {
        let frame = header.kind.name();
        let mut p = Payload { frame, rest: payload };
        p.expect_len(header.length as usize)?;
        let decoded = match header.kind {
            Kind::Hello => Frame::Hello { version: p.u16("version")?, agent: p.str8("agent")? },
            Kind::Welcome => Frame::Welcome { version: p.u16("version")?, agent: p.str8("agent")? },
            Kind::Open => Frame::Open { name: p.str8("name")? },
            Kind::Opened => {
                let (region, access) = (p.u32("region")?, Access::of_byte(frame, p.u8("access")?)?);
                let page_size = p.page_size()?;
                p.reserved()?;
                Frame::Opened { region, access, page_size, size_bytes: p.u64("size_bytes")? }
            }
            Kind::Failed => Frame::Failed { code: p.u16("code")?.into(), message: p.str16("message")? },
            Kind::Lane => Frame::Lane { class: Class::of_byte(frame, p.u8("class")?)? },
            Kind::Read => {
                let (region, count, first) = (p.u32("region")?, p.u32("count")?, p.u64("first")?);
                Frame::Read { region, extent: run_extent(frame, first, count)? }
            }
            Kind::Data => {
                let head = DataHead::decode(header, &p.array("count, serve_us and first")?)?;
                Frame::Data { serve_us: head.serve_us(), run: head.with_content(p.bytes())? }
            }
            Kind::Write => {
                let (region, count, first) = (p.u32("region")?, p.u32("count")?, p.u64("first")?);
                let encoding = Encoding::of_byte(frame, header.flags)?;
                let extent = run_extent(frame, first, count)?;
                Frame::Write { region, run: EncodedRun::of_field(frame, extent, encoding, p.bytes())? }
            }
            Kind::Flush => Frame::Flush { region: p.u32("region")? },
            Kind::Done => Frame::Done,
            Kind::Pull => {
                let (region, count, credit_bytes) = (p.u32("region")?, p.u32("extents")?, p.u64("credit_bytes")?);
                Frame::Pull { region, credit_bytes, extents: p.extents(count)? }
            }
            Kind::Credit => Frame::Credit { total_bytes: p.u64("total_bytes")? },
            Kind::End => Frame::End,
            Kind::Take => Frame::Take { session: p.u128("session")?, plan: p.plan()? },
            Kind::Offer => {
                let (session, epoch) = (p.u128("session")?, p.u64("epoch")?);
                let state_bytes = StateLength::of_field(frame, "state_bytes", p.u64("state_bytes")?)?;
                let count = p.u16("regions")?;
                let regions = p.list("regions", count.into(), OFFER_ITEM_MIN_BYTES as usize, |p| {
                    let (name, page_size) = (p.str8("name")?, p.page_size()?);
                    Ok(OfferedRegion { name, page_size, size_bytes: p.u64("size_bytes")?, address: p.u64("address")? })
                })?;
                let regions = OfferedRegions::of_field(frame, "regions", regions)?;
                Frame::Offer { session, epoch, state_bytes, regions }
            }
            Kind::State => Frame::State { bytes: StatePiece::of_field(frame, "bytes", p.bytes())? },
            Kind::Ready => Frame::Ready { session: p.u128("session")?, epoch: p.u64("epoch")? },
            Kind::Commit => Frame::Commit { session: p.u128("session")?, epoch: p.u64("epoch")? },
            Kind::Resumed => Frame::Resumed { session: p.u128("session")?, epoch: p.u64("epoch")? },
            Kind::Complete => Frame::Complete { session: p.u128("session")?, epoch: p.u64("epoch")? },
            Kind::Released => Frame::Released { session: p.u128("session")?, epoch: p.u64("epoch")? },
            Kind::Promote => Frame::Promote { session: p.u128("session")?, epoch: p.u64("epoch")? },
            Kind::Depose => Frame::Depose { session: p.u128("session")?, epoch: p.u64("epoch")? },
            Kind::Deposed => Frame::Deposed { session: p.u128("session")?, epoch: p.u64("epoch")? },
            Kind::Mark => Frame::Mark { number: p.u64("number")? },
            Kind::Kept => Frame::Kept { session: p.u128("session")?, epoch: p.u64("epoch")?, number: p.u64("number")? },
            Kind::Point => {
                let (session, epoch, number) = (p.u128("session")?, p.u64("epoch")?, p.u64("number")?);
                let age_us = p.u64("age_us")?;
                let state_bytes = StateLength::of_field(frame, "state_bytes", p.u64("state_bytes")?)?;
                Frame::Point { session, epoch, number, age_us, state_bytes }
            }
            Kind::Mapped => Frame::Mapped { session: p.u128("session")?, epoch: p.u64("epoch")?, since: p.u64("since")? },
            Kind::Prepare => {
                let (session, epoch) = (p.u128("session")?, p.u64("epoch")?);
                let state_bytes = StateLength::of_field(frame, "state_bytes", p.u64("state_bytes")?)?;
                Frame::Prepare { session, epoch, state_bytes }
            }
            Kind::Feed => {
                let (session, epoch) = (p.u128("session")?, p.u64("epoch")?);
                Frame::Feed { session, epoch, region: p.u32("region")?, credit_bytes: p.u64("credit_bytes")? }
            }
            Kind::Lacks => {
                let (count, more) = (p.u32("extents")?, p.flag("more")?);
                Frame::Lacks { more, extents: p.extents(count)? }
            }
            Kind::Progress => {
                let (session, epoch) = (p.u128("session")?, p.u64("epoch")?);
                let copying = Copying {
                    round: p.u32("round")?,
                    owed_bytes: p.u64("owed_bytes")?,
                    dirty_bytes_s: p.u64("dirty_bytes_s")?,
                    bandwidth_bytes_s: p.u64("bandwidth_bytes_s")?,
                    predicted_us: p.u64("predicted_us")?,
                };
                Frame::Progress { session, epoch, copying }
            }
            Kind::Abort => {
                let (session, epoch) = (p.u128("session")?, p.u64("epoch")?);
                Frame::Abort { session, epoch, code: p.u16("code")?.into(), message: p.str16("message")? }
            }
        };
        p.expect_len(0)?;
        Ok(decoded)
    }

    /// Appends the frame, header and payload. Content is copied: bulk senders use [`encode_data_head`].
    pub(crate) fn encode(&self, out: &mut BytesMut) {
        let start = out.len();
        out.put_bytes(0, HEADER_BYTES as usize);
        let mut flags = 0;
        match self {
            Frame::Hello { version, agent } | Frame::Welcome { version, agent } => {
                out.put_u16_le(*version);
                put_str8(out, agent);
            }
            Frame::Open { name } => put_str8(out, name),
            Frame::Opened { region, access, page_size, size_bytes } => {
                out.put_u32_le(*region);
                out.put_u8(*access as u8);
                put_page_size(out, *page_size);
                out.put_u16_le(0);
                out.put_u64_le(*size_bytes);
            }
            Frame::Failed { code, message } => put_failure(out, *code, message),
            Frame::Lane { class } => out.put_u8(*class as u8),
            Frame::Read { region, extent } => {
                out.put_u32_le(*region);
                out.put_u32_le(count_of(*extent));
                out.put_u64_le(extent.first());
            }
            Frame::Data { serve_us, run } => {
                flags = run.encoding() as u8;
                run.head(*serve_us).put(out);
                out.put_slice(run.bytes());
            }
            Frame::Write { region, run } => {
                flags = run.encoding() as u8;
                out.put_u32_le(*region);
                out.put_u32_le(run.count());
                out.put_u64_le(run.extent().first());
                out.put_slice(run.bytes());
            }
            Frame::Flush { region } => out.put_u32_le(*region),
            Frame::Done | Frame::End => {}
            Frame::Pull { region, credit_bytes, extents } => {
                out.put_u32_le(*region);
                out.put_u32_le(extents.len() as u32);
                out.put_u64_le(*credit_bytes);
                put_extents(out, extents);
            }
            Frame::Credit { total_bytes } => out.put_u64_le(*total_bytes),
            Frame::Take { session, plan } => {
                out.put_u128_le(*session);
                out.put_u8(plan.kind as u8);
                out.put_u8(plan.at_limit as u8);
                out.put_u16_le(plan.round_limit);
                out.put_u32_le(plan.downtime_limit_us);
                out.put_u64_le(plan.time_limit_ms);
                out.put_u64_le(plan.behind_bytes);
            }
            Frame::Offer { session, epoch, state_bytes, regions } => {
                put_turn(out, *session, *epoch);
                out.put_u64_le(**state_bytes);
                out.put_u16_le(regions.len() as u16);
                for region in regions.iter() {
                    put_str8(out, &region.name);
                    put_page_size(out, region.page_size);
                    out.put_u64_le(region.size_bytes);
                    out.put_u64_le(region.address);
                }
            }
            Frame::State { bytes } => out.put_slice(bytes),
            Frame::Ready { session, epoch }
            | Frame::Commit { session, epoch }
            | Frame::Resumed { session, epoch }
            | Frame::Complete { session, epoch }
            | Frame::Released { session, epoch }
            | Frame::Promote { session, epoch }
            | Frame::Depose { session, epoch }
            | Frame::Deposed { session, epoch } => put_turn(out, *session, *epoch),
            Frame::Mapped { session, epoch, since: number } | Frame::Kept { session, epoch, number } => {
                put_turn(out, *session, *epoch);
                out.put_u64_le(*number);
            }
            Frame::Mark { number } => out.put_u64_le(*number),
            Frame::Point { session, epoch, number, age_us, state_bytes } => {
                put_turn(out, *session, *epoch);
                out.put_u64_le(*number);
                out.put_u64_le(*age_us);
                out.put_u64_le(**state_bytes);
            }
            Frame::Prepare { session, epoch, state_bytes } => {
                put_turn(out, *session, *epoch);
                out.put_u64_le(**state_bytes);
            }
            Frame::Feed { session, epoch, region, credit_bytes } => {
                put_turn(out, *session, *epoch);
                out.put_u32_le(*region);
                out.put_u64_le(*credit_bytes);
            }
            Frame::Lacks { more, extents } => {
                out.put_u32_le(extents.len() as u32);
                out.put_u8((*more).into());
                put_extents(out, extents);
            }
            Frame::Progress { session, epoch, copying } => {
                put_turn(out, *session, *epoch);
                out.put_u32_le(copying.round);
                for number in [copying.owed_bytes, copying.dirty_bytes_s, copying.bandwidth_bytes_s, copying.predicted_us] {
                    out.put_u64_le(number);
                }
            }
            Frame::Abort { session, epoch, code, message } => {
                put_turn(out, *session, *epoch);
                put_failure(out, *code, message);
            }
        }
        let length = out.len() - start - HEADER_BYTES as usize;
        out[start..start + HEADER_BYTES as usize].copy_from_slice(&Header::new(self.kind(), flags, length as u32).encode());
    }
}

fn put_str8<const MIN: u32>(out: &mut BytesMut, text: &Limited<Box<str>, MIN, MAX_NAME_BYTES>) {
    out.put_u8(text.len() as u8);
    out.put_slice(text.as_bytes());
}

fn put_page_size(out: &mut BytesMut, size: PageSize) {
    out.put_u8(size.bytes().trailing_zeros() as u8);
}

fn put_failure(out: &mut BytesMut, code: ErrorCode, message: &Message) {
    out.put_u16_le(code.into());
    out.put_u16_le(message.len() as u16);
    out.put_slice(message.as_bytes());
}

fn put_extents(out: &mut BytesMut, extents: &[Extent]) {
    for extent in extents {
        out.put_u64_le(extent.first());
        out.put_u64_le(extent.count());
    }
}

fn put_turn(out: &mut BytesMut, session: u128, epoch: u64) {
    out.put_u128_le(session);
    out.put_u64_le(epoch);
}
