//! Jobs for fuzzers: what `fuzz/` drives and `tests/fuzz_corpus.rs` replays. No part of the API.
//!
//! Role: opens decoders of hostile bytes, and the pager's decisions, to fuzz targets without making them public. Neighbours: `net::wire`, `net::codec`,
//! `pager::model`.
//! Invariants: a function here tells a broken property from refused input, and panics on neither.

use crate::{
    Content, PageSize,
    net::{
        codec::{decode_run, encode_run},
        wire::{DATA_FIELDS_BYTES, DataHead, EncodedRun, Frame, HEADER_BYTES, Header, encode_data_head},
    },
    pager::model::{AddressOp, CoreEvent, ResidencyOp, events, try_address_map, try_core, try_residency},
};
use bytes::{Bytes, BytesMut};
use std::collections::BTreeSet;

/// Tries one of the pager's pure parts against its reference: the first byte says which, the next two are settings, then four bytes make an
/// event. Tells the names of the events and decisions that the trial came by.
///
/// # Errors
/// What does not hold that should.
pub fn pager_ops(input: &[u8]) -> Result<BTreeSet<&'static str>, String> {
    let Some((&[part, a, b], rest)) = input.split_first_chunk() else { return Ok(BTreeSet::new()) };
    match part % 4 {
        0 => try_residency([a, b], &events(rest, ResidencyOp::of)),
        1 => try_address_map(&events(rest, AddressOp::of)),
        // The core has the most to say.
        _ => try_core(1 + u64::from(a % 8), 1 + u64::from(b % 9), &events(rest, CoreEvent::of)),
    }
}

/// Decodes a stream of frames until one is refused or incomplete, and tells the names of those that decoded.
///
/// # Errors
/// What does not hold that should: a frame encodes to other bytes than it came from, a DATA frame and its head differ, or
/// decoded content does not have the length of its pages or comes out differently when sent on.
pub fn wire_decode(input: &[u8]) -> Result<Vec<&'static str>, String> {
    let mut names = Vec::new();
    let mut rest = Bytes::copy_from_slice(input);
    while let Some(Ok(header)) = rest.first_chunk().map(Header::decode) {
        let whole_bytes = HEADER_BYTES as usize + header.length() as usize;
        if rest.len() < whole_bytes {
            break;
        }
        let bytes = rest.split_to(whole_bytes);
        let Ok(frame) = Frame::decode(header, bytes.slice(HEADER_BYTES as usize..)) else { break };
        let mut encoded = BytesMut::new();
        frame.encode(&mut encoded);
        if encoded != bytes {
            return Err(format!("{frame:?} came from {bytes:?}, encodes to {encoded:?}"));
        }
        match &frame {
            Frame::Data { serve_us, run } => {
                check_head(header, &bytes, run.head(*serve_us))?;
                check_content(run)?;
            }
            Frame::Write { run, .. } => check_content(run)?,
            _ => {}
        }
        names.push(header.kind().name());
    }
    Ok(names)
}

/// Decoding the head alone finds what decoding the frame found.
fn check_head(header: Header, bytes: &[u8], expected: DataHead) -> Result<(), String> {
    let (_, after_header) = bytes.split_at(HEADER_BYTES as usize);
    let fields: &[u8; DATA_FIELDS_BYTES] = after_header.first_chunk().ok_or("a DATA frame decoded without its fields")?;
    let head = DataHead::decode(header, fields).map_err(|error| error.to_string())?;
    if head == expected && bytes.starts_with(&encode_data_head(head)) {
        Ok(())
    } else {
        Err(format!("the head is {head:?}, the frame has {expected:?}"))
    }
}

/// Content that decodes has the length of its pages and survives being sent on.
fn check_content(run: &EncodedRun) -> Result<(), String> {
    let Ok(len) = run.decoded_len(PageSize::KIB_4) else { return Ok(()) };
    let Ok(content) = decode_run(run.encoding(), run.bytes().clone(), len) else { return Ok(()) };
    let expected = match &content {
        Content::Bytes(bytes) if bytes.len() != len => return Err(format!("{} bytes for pages of {len}", bytes.len())),
        Content::Bytes(bytes) if bytes.iter().any(|byte| *byte != 0) => content.clone(),
        _ => Content::Zero,
    };
    let (encoding, bytes) = encode_run(content, true);
    match decode_run(encoding, bytes, len) {
        Ok(again) if again == expected => Ok(()),
        other => Err(format!("content sent on as {encoding:?} comes out as {other:?}")),
    }
}
