//! Decisions: the pages inside DATA and WRITE.
//!
//! Role: an extent with its encoded content, and the head of a DATA frame on its own, for a reader or writer that moves the
//! content without building a frame. Neighbours: `codec` encodes and decodes the content. Invariants: content is at most
//! [`MAX_RUN_BYTES`] as sent (checked when made) and as decoded (checked by `decoded_len`, which needs the page size).

use super::{
    DATA_HEAD_BYTES, Encoding, HEADER_BYTES, Header, Kind, MAX_RUN_BYTES, RunExtent, WireError,
    fields::{count_of, in_range, run_extent},
};
use crate::{Extent, PageSize};
use bytes::{Buf, BufMut, Bytes};
use std::ops::RangeInclusive;

/// Bytes of the fields between the header of a DATA frame and its content.
pub(crate) const DATA_FIELDS_BYTES: usize = (DATA_HEAD_BYTES - HEADER_BYTES) as usize;

impl Encoding {
    /// How many bytes content may have as sent.
    pub(super) const fn lengths(self) -> RangeInclusive<u32> {
        match self {
            Encoding::Zero => 0..=0,
            Encoding::Raw | Encoding::Lz4 => 1..=MAX_RUN_BYTES,
        }
    }

    fn check_len(self, frame: &'static str, len_bytes: usize) -> Result<(), WireError> {
        let (min, max) = self.lengths().into_inner();
        in_range(frame, "content in bytes", len_bytes as u64, min, max)
    }

    /// The length of the pages that `len_bytes` of content stand for.
    fn decoded_len(
        self,
        frame: &'static str,
        extent: RunExtent,
        len_bytes: usize,
        page_size: PageSize,
    ) -> Result<usize, WireError> {
        let decoded_bytes = extent.bytes(page_size);
        in_range(frame, "length of pages in bytes", decoded_bytes, 1, MAX_RUN_BYTES)?;
        let decoded_bytes = decoded_bytes as usize;
        if self == Encoding::Raw && len_bytes != decoded_bytes {
            return Err(WireError::ContentLength { encoding: self, found_bytes: len_bytes, expected_bytes: decoded_bytes });
        }
        Ok(decoded_bytes)
    }
}

/// An extent with its content as it travels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EncodedRun {
    extent: RunExtent,
    encoding: Encoding,
    bytes: Bytes,
}

impl EncodedRun {
    /// Content as [`encode_run`](crate::net::codec::encode_run) made it.
    ///
    /// # Errors
    /// [`WireError::OutOfRange`] if the extent is empty or longer than `u32::MAX` pages, or the content is longer than
    /// [`MAX_RUN_BYTES`], or there is content for zeros or none for anything else.
    pub(crate) fn new(extent: Extent, encoding: Encoding, bytes: Bytes) -> Result<EncodedRun, WireError> {
        EncodedRun::of_field("outgoing frame", RunExtent::new(extent)?, encoding, bytes)
    }

    pub(super) fn of_field(
        frame: &'static str,
        extent: RunExtent,
        encoding: Encoding,
        bytes: Bytes,
    ) -> Result<EncodedRun, WireError> {
        encoding.check_len(frame, bytes.len())?;
        Ok(EncodedRun { extent, encoding, bytes })
    }

    pub(crate) fn extent(&self) -> Extent {
        *self.extent
    }

    pub(crate) fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// The content as sent.
    pub(crate) fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    pub(super) fn count(&self) -> u32 {
        count_of(self.extent)
    }

    /// The head of a DATA frame that carries this run, answered after `serve_us` at the server.
    pub(crate) fn head(&self, serve_us: u32) -> DataHead {
        // Checked against MAX_RUN_BYTES when made.
        let len_bytes = self.bytes.len() as u32;
        DataHead { encoding: self.encoding, extent: self.extent, serve_us, len_bytes }
    }

    /// The length of the pages in bytes.
    ///
    /// # Errors
    /// [`WireError::OutOfRange`] if it exceeds [`MAX_RUN_BYTES`], [`WireError::ContentLength`] if raw content is not as long.
    pub(crate) fn decoded_len(&self, page_size: PageSize) -> Result<usize, WireError> {
        self.encoding.decoded_len("run", self.extent, self.bytes.len(), page_size)
    }
}

/// A DATA frame up to its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DataHead {
    encoding: Encoding,
    extent: RunExtent,
    serve_us: u32,
    len_bytes: u32,
}

impl DataHead {
    /// The head of a frame that carries `len_bytes` of content for `extent`, answered after `serve_us` at the server.
    ///
    /// # Errors
    /// As for [`EncodedRun::new`].
    pub(crate) fn new(encoding: Encoding, extent: Extent, serve_us: u32, len_bytes: usize) -> Result<DataHead, WireError> {
        encoding.check_len(Kind::Data.name(), len_bytes)?;
        Ok(DataHead { encoding, extent: RunExtent::new(extent)?, serve_us, len_bytes: len_bytes as u32 })
    }

    /// Reads the fields that follow the header of a DATA frame; the content, [`len_bytes`](DataHead::len_bytes) of it, comes next.
    ///
    /// # Errors
    /// [`WireError::Unexpected`] if the header is that of another kind, [`WireError::OutOfRange`] if there are no pages,
    /// [`WireError::ExtentOverflow`].
    pub(crate) fn decode(header: Header, fields: &[u8; DATA_FIELDS_BYTES]) -> Result<DataHead, WireError> {
        let frame = header.kind().name();
        if header.kind() != Kind::Data {
            return Err(WireError::Unexpected { found: frame, expected: Kind::Data.name() });
        }
        let mut rest = &fields[..];
        let (count, serve_us, first) = (rest.get_u32_le(), rest.get_u32_le(), rest.get_u64_le());
        Ok(DataHead {
            encoding: Encoding::of_byte(frame, header.flags())?,
            extent: run_extent(frame, first, count)?,
            serve_us,
            len_bytes: header.length().saturating_sub(DATA_FIELDS_BYTES as u32),
        })
    }

    /// The run, given its content.
    pub(crate) fn with_content(self, bytes: Bytes) -> Result<EncodedRun, WireError> {
        EncodedRun::of_field(Kind::Data.name(), self.extent, self.encoding, bytes)
    }

    pub(super) fn put(self, out: &mut impl BufMut) {
        out.put_u32_le(count_of(self.extent));
        out.put_u32_le(self.serve_us);
        out.put_u64_le(self.extent.first());
    }

    pub(crate) fn encoding(&self) -> Encoding {
        self.encoding
    }

    pub(crate) fn extent(&self) -> Extent {
        *self.extent
    }

    /// Time from the request to the answer at the server.
    pub(crate) fn serve_us(&self) -> u32 {
        self.serve_us
    }

    /// How many bytes of content follow.
    pub(crate) fn len_bytes(&self) -> usize {
        self.len_bytes as usize
    }

    /// The length of the pages in bytes.
    ///
    /// # Errors
    /// As for [`EncodedRun::decoded_len`].
    pub(crate) fn decoded_len(&self, page_size: PageSize) -> Result<usize, WireError> {
        self.encoding.decoded_len(Kind::Data.name(), self.extent, self.len_bytes(), page_size)
    }
}

/// The first [`DATA_HEAD_BYTES`] of a DATA frame; its content follows.
pub(crate) fn encode_data_head(head: DataHead) -> [u8; DATA_HEAD_BYTES as usize] {
    let mut bytes = [0; DATA_HEAD_BYTES as usize];
    let (header, mut fields) = bytes.split_at_mut(HEADER_BYTES as usize);
    header.copy_from_slice(&Header::new(Kind::Data, head.encoding as u8, head.len_bytes + fields.len() as u32).encode());
    head.put(&mut fields);
    bytes
}
