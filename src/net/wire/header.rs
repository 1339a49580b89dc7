//! Decisions: the kinds of frames, and the eight bytes in front of each.
//!
//! Role: says what follows and how long it may be. Neighbours: [`Frame`](super::Frame) reads and writes what follows. Invariants: S7: a length is inside the limits of its kind before anything is
//! allocated for it.

use super::{
    Encoding, HEADER_BYTES, MAX_MESSAGE_BYTES, MAX_NAME_BYTES, MAX_OFFER_REGIONS, MAX_PULL_EXTENTS, MAX_RUN_BYTES,
    MAX_STATE_PIECE_BYTES, WireError,
    fields::{EXTENT_BYTES, in_range},
};
use std::ops::RangeInclusive;

macro_rules! kinds {
    ($($number:literal $name:literal $kind:ident $min:expr, $max:expr;)*) => {
        /// What a frame is: the first byte of its header.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub(crate) enum Kind { $($kind = $number,)* }

        impl Kind {
            #[cfg(test)]
            pub(crate) const ALL: &[Kind] = &[$(Kind::$kind,)*];

            fn of_byte(byte: u8) -> Option<Kind> {
                match byte { $($number => Some(Kind::$kind),)* _ => None }
            }

            /// The name in docs/protocol.md.
            pub(crate) const fn name(self) -> &'static str {
                match self { $(Kind::$kind => $name,)* }
            }

            /// How long the payload may be, in bytes.
            pub(crate) const fn lengths(self) -> RangeInclusive<u32> {
                match self { $(Kind::$kind => $min..=$max,)* }
            }
        }
    };
}

kinds! {
    // kind and name     shortest and longest payload in bytes
    0x01 "HELLO"     Hello     3, 3 + MAX_NAME_BYTES;
    0x02 "WELCOME"   Welcome   3, 3 + MAX_NAME_BYTES;
    0x03 "OPEN"      Open      2, 1 + MAX_NAME_BYTES;
    0x04 "OPENED"    Opened    16, 16;
    0x05 "FAILED"    Failed    4, 4 + MAX_MESSAGE_BYTES;
    0x06 "LANE"      Lane      1, 1;
    0x10 "READ"      Read      16, 16;
    0x11 "DATA"      Data      16, 16 + MAX_RUN_BYTES;
    0x12 "WRITE"     Write     16, 16 + MAX_RUN_BYTES;
    0x13 "FLUSH"     Flush     4, 4;
    0x14 "DONE"      Done      0, 0;
    0x20 "PULL"      Pull      16, 16 + MAX_PULL_EXTENTS * EXTENT_BYTES;
    0x21 "CREDIT"    Credit    8, 8;
    0x22 "END"       End       0, 0;
    0x30 "TAKE"      Take      40, 40;
    0x31 "OFFER"     Offer     34, 34 + MAX_OFFER_REGIONS * (OFFER_ITEM_MIN_BYTES - 1 + MAX_NAME_BYTES);
    0x32 "STATE"     State     1, MAX_STATE_PIECE_BYTES;
    0x33 "READY"     Ready     24, 24;
    0x34 "COMMIT"    Commit    24, 24;
    0x35 "RESUMED"   Resumed   24, 24;
    0x36 "COMPLETE"  Complete  24, 24;
    0x37 "RELEASED"  Released  24, 24;
    0x38 "ABORT"     Abort     28, 28 + MAX_MESSAGE_BYTES;
    0x39 "MAPPED"    Mapped    32, 32;
    0x3a "PREPARE"   Prepare   32, 32;
    0x3b "FEED"      Feed      36, 36;
    0x3c "LACKS"     Lacks     5, 5 + MAX_PULL_EXTENTS * EXTENT_BYTES;
    0x3d "PROGRESS"  Progress  60, 60;
    0x3e "POINT"     Point     48, 48;
    0x3f "MARK"      Mark      8, 8;
    0x40 "KEPT"      Kept      32, 32;
    0x41 "PROMOTE"   Promote   24, 24;
    0x42 "DEPOSE"    Depose    24, 24;
    0x43 "DEPOSED"   Deposed   24, 24;
}

/// A region of an OFFER with a name of one byte.
pub(super) const OFFER_ITEM_MIN_BYTES: u32 = 2 + 1 + 8 + 8;

/// The first eight bytes of a frame. Only [`decode`](Header::decode) makes one from bytes, so a header in hand lies within the
/// limits and its [`length`](Header::length) may be allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(super) kind: Kind,
    pub(super) flags: u8,
    pub(super) length: u32,
}

impl Header {
    pub(super) fn new(kind: Kind, flags: u8, length: u32) -> Header {
        Header { kind, flags, length }
    }

    /// Reads and checks a header.
    ///
    /// # Errors
    /// [`WireError::UnknownKind`], [`WireError::Reserved`] if the reserved field or unused flags are set,
    /// [`WireError::OutOfRange`] if the encoding is unknown or the length is not allowed for the kind and encoding.
    pub(crate) fn decode(bytes: &[u8; HEADER_BYTES as usize]) -> Result<Header, WireError> {
        let [kind, flags, reserved_low, reserved_high, l0, l1, l2, l3] = *bytes;
        let kind = Kind::of_byte(kind).ok_or(WireError::UnknownKind { kind })?;
        let (frame, reserved) = (kind.name(), u16::from_le_bytes([reserved_low, reserved_high]));
        if reserved != 0 {
            return Err(WireError::Reserved { frame, field: "reserved", found: reserved });
        }
        let (mut min, mut max) = kind.lengths().into_inner();
        if let Kind::Data | Kind::Write = kind {
            let (content_min, content_max) = Encoding::of_byte(frame, flags)?.lengths().into_inner();
            (min, max) = (min + content_min, min + content_max);
        } else if flags != 0 {
            return Err(WireError::Reserved { frame, field: "flags", found: flags.into() });
        }
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        in_range(frame, "length of payload in bytes", length.into(), min, max)?;
        Ok(Header::new(kind, flags, length))
    }

    pub(super) fn encode(self) -> [u8; HEADER_BYTES as usize] {
        let [l0, l1, l2, l3] = self.length.to_le_bytes();
        [self.kind as u8, self.flags, 0, 0, l0, l1, l2, l3]
    }

    pub(crate) fn kind(self) -> Kind {
        self.kind
    }

    /// The [`Encoding`] of DATA and WRITE, else 0.
    pub(crate) fn flags(self) -> u8 {
        self.flags
    }

    /// Bytes of payload that follow.
    pub(crate) fn length(self) -> u32 {
        self.length
    }
}
