//! Decisions: the fields of frames: limits, bounded values and the reader that never reads past its payload.
//!
//! Role: a value that may travel has a type that only its limits admit. Neighbours: the frames in [`super`] are made of these.
//! Invariants: every limit is a constant of this file and stands in docs/protocol.md; [`Payload`] checks a length before it
//! takes or allocates; a [`Limited`] lies inside its limits, which is why encoding cannot fail.

use crate::{Extent, PageSize};
use bytes::{Buf, Bytes};
use std::{ops::Deref, str::from_utf8};
use thiserror::Error;

macro_rules! limits {
    ($($(#[$doc:meta])* $name:ident = $value:expr;)*) => {
        $($(#[$doc])* pub(crate) const $name: u32 = $value;)*
        #[cfg(test)]
        pub(super) const LIMITS: &[(&str, u32)] = &[$((stringify!($name), $name),)*];
    };
}

limits! {
    /// The version of the protocol that this crate speaks.
    PROTOCOL_VERSION = 1;
    /// Bytes of a header.
    HEADER_BYTES = 8;
    /// Bytes of a DATA frame before its content: header, then `count`, `serve_us` and `first`.
    DATA_HEAD_BYTES = HEADER_BYTES + 16;
    /// Content of one DATA or WRITE frame, as sent and as decoded: what a receiver must be ready to hold for one frame.
    MAX_RUN_BYTES = 1 << 20;
    /// Pages that one READ may ask for, in bytes: what a server must be ready to read for one request.
    MAX_READ_BYTES = 16 << 20;
    /// Extents of one PULL or LACKS: 1 MiB of them, as much as a run.
    MAX_PULL_EXTENTS = 65_536;
    /// The program's own state that moves with a handover, all STATE frames together.
    MAX_STATE_BYTES = 64 << 20;
    /// State in one STATE frame.
    MAX_STATE_PIECE_BYTES = 1 << 20;
    /// Regions in one OFFER.
    MAX_OFFER_REGIONS = 1024;
    /// Bytes of a region's name and of an agent.
    MAX_NAME_BYTES = 255;
    /// Bytes of an error's message.
    MAX_MESSAGE_BYTES = 1024;
}

/// Bytes that are no frame, or a value that no frame may carry.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(crate) enum WireError {
    #[error("frame kind {kind:#04x} is unknown to protocol version {PROTOCOL_VERSION}")]
    UnknownKind { kind: u8 },
    #[error("{found} came where {expected} is expected")]
    Unexpected { found: &'static str, expected: &'static str },
    #[error("{frame}: {field} is {found:#x}, but reserved and must be 0")]
    Reserved { frame: &'static str, field: &'static str, found: u16 },
    #[error("{frame}: {field} is {found}, allowed is {min} to {max}")]
    OutOfRange { frame: &'static str, field: &'static str, found: u64, min: u64, max: u64 },
    #[error("{frame}: {field} needs {needed_bytes} bytes, {left_bytes} are left of the payload")]
    Truncated { frame: &'static str, field: &'static str, needed_bytes: usize, left_bytes: usize },
    #[error("{frame}: {extra_bytes} bytes follow the last field")]
    Trailing { frame: &'static str, extra_bytes: usize },
    #[error("{frame}: {field} is not UTF-8 from byte {valid_bytes} on")]
    NotUtf8 { frame: &'static str, field: &'static str, valid_bytes: usize },
    #[error("{frame}: {count} pages from page {first} end past the last page that a u64 can number")]
    ExtentOverflow { frame: &'static str, first: u64, count: u64 },
    #[error("{encoding:?} content of {found_bytes} bytes for pages of {expected_bytes} bytes")]
    ContentLength { encoding: Encoding, found_bytes: usize, expected_bytes: usize },
    #[error("lz4 content of {found_bytes} bytes for pages of {expected_bytes} bytes is broken: {reason}")]
    BrokenContent { found_bytes: usize, expected_bytes: usize, reason: String },
}

/// Checks a number against the range allowed for it.
pub(super) fn in_range(frame: &'static str, field: &'static str, found: u64, min: u32, max: u32) -> Result<(), WireError> {
    if found >= u64::from(min) && found <= u64::from(max) {
        Ok(())
    } else {
        Err(WireError::OutOfRange { frame, field, found, min: min.into(), max: max.into() })
    }
}

/// What a [`Limited`] limits: bytes of a text or buffer, elements of a list, pages of an extent, a number itself.
pub(crate) trait Measure {
    const UNIT: &'static str;
    fn measure(&self) -> u64;
}

macro_rules! measure {
    ($($type:ty, $unit:literal, |$value:ident| $measure:expr;)*) => {
        $(impl Measure for $type {
            const UNIT: &'static str = $unit;
            fn measure(&self) -> u64 { let $value = self; $measure }
        })*
    };
}

measure! {
    Box<str>, "length of text in bytes", |text| text.len() as u64;
    Bytes, "length in bytes", |bytes| bytes.len() as u64;
    Vec<Extent>, "number of extents", |extents| extents.len() as u64;
    Vec<super::OfferedRegion>, "number of regions", |regions| regions.len() as u64;
    Extent, "number of pages", |extent| extent.count();
    u64, "number", |number| *number;
}

/// A value whose measure lies in `MIN..=MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limited<T, const MIN: u32, const MAX: u32>(T);

pub(crate) type Name = Limited<Box<str>, 1, MAX_NAME_BYTES>;
pub(crate) type Agent = Limited<Box<str>, 0, MAX_NAME_BYTES>;
pub(crate) type Message = Limited<Box<str>, 0, MAX_MESSAGE_BYTES>;
/// The extent of one READ, WRITE or DATA; its count travels as a `u32`.
pub(crate) type RunExtent = Limited<Extent, 1, { u32::MAX }>;
pub(crate) type PullExtents = Limited<Vec<Extent>, 0, MAX_PULL_EXTENTS>;
pub(crate) type OfferedRegions = Limited<Vec<super::OfferedRegion>, 0, MAX_OFFER_REGIONS>;
pub(crate) type StateLength = Limited<u64, 0, MAX_STATE_BYTES>;
pub(crate) type StatePiece = Limited<Bytes, 1, MAX_STATE_PIECE_BYTES>;

impl<T: Measure, const MIN: u32, const MAX: u32> Limited<T, MIN, MAX> {
    /// The value, if its measure is allowed.
    pub(crate) fn new(value: impl Into<T>) -> Result<Self, WireError> {
        Self::of_field("outgoing frame", T::UNIT, value.into())
    }

    pub(super) fn of_field(frame: &'static str, field: &'static str, value: T) -> Result<Self, WireError> {
        in_range(frame, field, value.measure(), MIN, MAX)?;
        Ok(Limited(value))
    }
}

impl<const MAX: u32> Limited<Box<str>, 0, MAX> {
    /// The text, cut after the last character that fits: an error report is never lost for being long.
    pub(crate) fn cut(text: &str) -> Self {
        let mut end = text.len().min(MAX as usize);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        Limited(text[..end].into())
    }
}

impl<T, const MIN: u32, const MAX: u32> Deref for Limited<T, MIN, MAX> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

macro_rules! byte_enum {
    ($(#[$doc:meta])* $name:ident $field:literal { $($(#[$variant_doc:meta])* $variant:ident = $number:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[repr(u8)]
        pub(crate) enum $name { $($(#[$variant_doc])* $variant = $number,)* }

        impl $name {
            pub(super) fn of_byte(frame: &'static str, byte: u8) -> Result<$name, WireError> {
                const MAX: u32 = [$($number,)*].len() as u32 - 1;
                match byte {
                    $($number => Ok($name::$variant),)*
                    _ => Err(WireError::OutOfRange { frame, field: $field, found: byte.into(), min: 0, max: MAX.into() }),
                }
            }
        }
    };
}

byte_enum! {
    /// How the content of DATA and WRITE is sent; the frame's flags.
    Encoding "encoding" {
        /// No bytes: every page is zero.
        Zero = 0,
        /// The pages as they are.
        Raw = 1,
        /// One LZ4 block.
        Lz4 = 2,
    }
}

byte_enum! {
    /// Which requests go first; the order is the order of urgency.
    Class "class" {
        /// Pulls and pushes.
        Background = 0,
        /// The neighbours of a fault.
        Behind = 1,
        /// A fault waits for it.
        Demand = 2,
    }
}

byte_enum! {
    /// When the pages of a program move: before it, after it, or both.
    MoveKind "strategy" {
        PostCopy = 0,
        PreCopy = 1,
        Hybrid = 2,
        /// The destination follows the program until it is promoted.
        Standby = 3,
    }
}

byte_enum! {
    /// What happens when copying has reached a limit.
    AtLimit "at_limit" {
        /// The program stays where it is.
        Cancel = 0,
        /// It moves, and what the destination lacks follows.
        Force = 1,
    }
}

/// How a destination wants the program to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) kind: MoveKind,
    pub(crate) at_limit: AtLimit,
    /// Rounds of copying.
    pub(crate) round_limit: u16,
    pub(crate) downtime_limit_us: u32,
    /// Of copying; 0: none. Of a standby: how far behind it may be.
    pub(crate) time_limit_ms: u64,
    /// How many bytes a standby may be behind; 0: no limit.
    pub(crate) behind_bytes: u64,
}

impl Plan {
    pub(crate) const POST_COPY: Plan = Plan {
        kind: MoveKind::PostCopy,
        at_limit: AtLimit::Cancel,
        round_limit: 0,
        downtime_limit_us: 0,
        time_limit_ms: 0,
        behind_bytes: 0,
    };
}

byte_enum! {
    /// What the opener of a region was granted.
    Access "access" {
        Read = 0,
        ReadWrite = 1,
    }
}

macro_rules! error_codes {
    ($($(#[$doc:meta])* $name:ident = $code:literal,)*) => {
        /// Why a request failed. A code of a later version is kept as [`Other`](ErrorCode::Other).
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum ErrorCode { $($(#[$doc])* $name,)* Other(u16) }

        impl From<u16> for ErrorCode {
            fn from(code: u16) -> ErrorCode {
                match code { $($code => ErrorCode::$name,)* other => ErrorCode::Other(other) }
            }
        }

        impl From<ErrorCode> for u16 {
            fn from(code: ErrorCode) -> u16 {
                match code { $(ErrorCode::$name => $code,)* ErrorCode::Other(other) => other }
            }
        }

        #[cfg(test)]
        pub(super) const ERROR_CODES: &[(u16, &str)] = &[$(($code, stringify!($name)),)*];
    };
}

error_codes! {
    /// The peer speaks no version that this end speaks.
    UnknownVersion = 1,
    /// The region does not exist or was not granted: which of the two is not told.
    NotGranted = 2,
    /// The grant or the store allows no writes.
    ReadOnly = 3,
    /// The extent ends past the region.
    OutOfRange = 4,
    /// A frame is malformed, too large, or not allowed at this place.
    BadFrame = 5,
    /// The store behind the region failed.
    StoreFailed = 6,
    /// Too many requests, streams or regions; try later.
    Busy = 7,
    /// No such session.
    NoSession = 8,
    /// The session was aborted.
    Aborted = 9,
    /// This end does not own the program.
    NotOwner = 10,
    /// The source's owner wants nothing more of the session.
    CalledOff = 11,
}

/// An extent of a PULL or LACKS: `first` and `count`.
pub(super) const EXTENT_BYTES: u32 = 16;

/// The extent of `count` pages from `first`.
pub(super) fn extent(frame: &'static str, first: u64, count: u64) -> Result<Extent, WireError> {
    Extent::new(first, count).ok_or(WireError::ExtentOverflow { frame, first, count })
}

/// The extent of a READ, WRITE or DATA.
pub(super) fn run_extent(frame: &'static str, first: u64, count: u32) -> Result<RunExtent, WireError> {
    RunExtent::of_field(frame, "count", extent(frame, first, count.into())?)
}

/// The page count as it travels.
pub(super) fn count_of(extent: RunExtent) -> u32 {
    // RunExtent admits no more than u32::MAX.
    extent.count() as u32
}

/// What is left of a frame's payload while its fields are taken off one by one.
pub(super) struct Payload {
    pub(super) frame: &'static str,
    pub(super) rest: Bytes,
}

impl Payload {
    /// Takes a fixed-size field.
    pub(super) fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], WireError> {
        match self.rest.first_chunk() {
            Some(bytes) => {
                let bytes = *bytes;
                self.rest.advance(N);
                Ok(bytes)
            }
            None => Err(self.truncated(field, N)),
        }
    }

    pub(super) fn u8(&mut self, field: &'static str) -> Result<u8, WireError> {
        self.array(field).map(u8::from_le_bytes)
    }

    pub(super) fn u16(&mut self, field: &'static str) -> Result<u16, WireError> {
        self.array(field).map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self, field: &'static str) -> Result<u32, WireError> {
        self.array(field).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, field: &'static str) -> Result<u64, WireError> {
        self.array(field).map(u64::from_le_bytes)
    }

    pub(super) fn u128(&mut self, field: &'static str) -> Result<u128, WireError> {
        self.array(field).map(u128::from_le_bytes)
    }

    pub(super) fn reserved(&mut self) -> Result<(), WireError> {
        match self.u16("reserved")? {
            0 => Ok(()),
            found => Err(WireError::Reserved { frame: self.frame, field: "reserved", found }),
        }
    }

    pub(super) fn page_size(&mut self) -> Result<PageSize, WireError> {
        let shift = self.u8("page_shift")?;
        1u64.checked_shl(shift.into()).and_then(PageSize::new).ok_or(WireError::OutOfRange {
            frame: self.frame,
            field: "page_shift",
            found: shift.into(),
            min: 9,
            max: 30,
        })
    }

    pub(super) fn flag(&mut self, field: &'static str) -> Result<bool, WireError> {
        let found = self.u8(field)?;
        in_range(self.frame, field, found.into(), 0, 1).map(|()| found == 1)
    }

    pub(super) fn extents(&mut self, count: u32) -> Result<PullExtents, WireError> {
        let frame = self.frame;
        let take = |p: &mut Payload| extent(frame, p.u64("first")?, p.u64("count")?);
        let extents = self.list("extents", count as usize, EXTENT_BYTES as usize, take)?;
        PullExtents::of_field(frame, "extents", extents)
    }

    pub(super) fn plan(&mut self) -> Result<Plan, WireError> {
        Ok(Plan {
            kind: MoveKind::of_byte(self.frame, self.u8("strategy")?)?,
            at_limit: AtLimit::of_byte(self.frame, self.u8("at_limit")?)?,
            round_limit: self.u16("round_limit")?,
            downtime_limit_us: self.u32("downtime_limit_us")?,
            time_limit_ms: self.u64("time_limit_ms")?,
            behind_bytes: self.u64("behind_bytes")?,
        })
    }

    /// Takes a text with a length of one byte.
    pub(super) fn str8<const MIN: u32>(
        &mut self,
        field: &'static str,
    ) -> Result<Limited<Box<str>, MIN, MAX_NAME_BYTES>, WireError> {
        let len = self.u8(field)?;
        self.text(field, len.into())
    }

    /// Takes a text with a length of two bytes.
    pub(super) fn str16(&mut self, field: &'static str) -> Result<Message, WireError> {
        let len = self.u16(field)?;
        self.text(field, len.into())
    }

    fn text<const MIN: u32, const MAX: u32>(
        &mut self,
        field: &'static str,
        len: u32,
    ) -> Result<Limited<Box<str>, MIN, MAX>, WireError> {
        in_range(self.frame, field, len.into(), MIN, MAX)?;
        let len = len as usize;
        let Some(bytes) = self.rest.get(..len) else { return Err(self.truncated(field, len)) };
        let text = from_utf8(bytes).map_err(|error| {
            let valid_bytes = error.valid_up_to();
            WireError::NotUtf8 { frame: self.frame, field, valid_bytes }
        })?;
        let text = Limited::of_field(self.frame, field, text.into())?;
        self.rest.advance(len);
        Ok(text)
    }

    /// Takes `count` elements of at least `min_bytes` each. Nothing is allocated for elements that cannot be there.
    pub(super) fn list<T>(
        &mut self,
        field: &'static str,
        count: usize,
        min_bytes: usize,
        take: impl Fn(&mut Payload) -> Result<T, WireError>,
    ) -> Result<Vec<T>, WireError> {
        let needed_bytes = count.saturating_mul(min_bytes);
        if needed_bytes > self.rest.len() {
            return Err(self.truncated(field, needed_bytes));
        }
        let mut list = Vec::with_capacity(count);
        for _ in 0..count {
            list.push(take(self)?);
        }
        Ok(list)
    }

    /// Takes all that is left.
    pub(super) fn bytes(&mut self) -> Bytes {
        std::mem::take(&mut self.rest)
    }

    /// Checks that exactly `len` bytes are left.
    pub(super) fn expect_len(&self, len: usize) -> Result<(), WireError> {
        match self.rest.len().checked_sub(len) {
            Some(0) => Ok(()),
            Some(extra_bytes) => Err(WireError::Trailing { frame: self.frame, extra_bytes }),
            None => Err(self.truncated("payload", len)),
        }
    }

    fn truncated(&self, field: &'static str, needed_bytes: usize) -> WireError {
        WireError::Truncated { frame: self.frame, field, needed_bytes, left_bytes: self.rest.len() }
    }
}
