//! Tests of the frames: fixed bytes, every value there and back, every way to be malformed.

mod golden;
mod random;

use super::*;
use crate::{Content, Extent, net::codec::decode_run};
use golden::{Golden, goldens};
use std::path::Path;

fn decode(bytes: &[u8]) -> Result<Frame, WireError> {
    let (header, payload) = bytes.split_first_chunk().expect("the test gives a whole header");
    Frame::decode(Header::decode(header)?, Bytes::copy_from_slice(payload))
}

fn encode(frame: &Frame) -> BytesMut {
    let mut out = BytesMut::new();
    frame.encode(&mut out);
    out
}

/// A header as a peer might send it, right or wrong.
fn header(kind: Kind, flags: u8, reserved: u16, length: u32) -> [u8; HEADER_BYTES as usize] {
    let mut bytes = [kind as u8, flags, 0, 0, 0, 0, 0, 0];
    bytes[2..4].copy_from_slice(&reserved.to_le_bytes());
    bytes[4..].copy_from_slice(&length.to_le_bytes());
    bytes
}

/// A golden frame with its payload changed, and its header made to fit.
fn altered(kind: Kind, change: impl FnOnce(&mut Vec<u8>)) -> Result<Frame, WireError> {
    let Golden { bytes, .. } = goldens().into_iter().find(|golden| golden.frame.kind() == kind).expect("every kind is golden");
    let mut payload = bytes[HEADER_BYTES as usize..].to_vec();
    change(&mut payload);
    decode(&[&header(kind, bytes[1], 0, payload.len() as u32)[..], &payload].concat())
}

#[test]
fn every_frame_has_its_golden_bytes() {
    for Golden { name, frame, bytes } in goldens() {
        assert_eq!(encode(&frame), bytes, "{name} encodes");
        assert_eq!(decode(&bytes), Ok(frame), "{name} decodes");
    }
    let kinds: Vec<Kind> = goldens().iter().map(|golden| golden.frame.kind()).collect();
    for kind in Kind::ALL {
        assert!(kinds.contains(kind), "{} has no golden bytes", kind.name());
    }
}

#[test]
fn encoding_appends_to_what_is_there() {
    let mut out = BytesMut::new();
    Frame::Done.encode(&mut out);
    Frame::Flush { region: 2 }.encode(&mut out);
    assert_eq!(out, [&encode(&Frame::Done)[..], &encode(&Frame::Flush { region: 2 })].concat());
}

#[test]
fn the_golden_lz4_block_is_a_page() {
    let golden = goldens().into_iter().find(|golden| golden.name == "data_lz4").expect("it is golden");
    let Frame::Data { run, .. } = golden.frame else { panic!("{:?} is no DATA", golden.frame) };
    let len = run.decoded_len(PageSize::KIB_4).unwrap();
    let content = decode_run(run.encoding(), run.bytes().clone(), len).unwrap();
    assert_eq!(content, Content::Bytes(vec![0x55; 4096].into()));
}

#[test]
fn an_unknown_kind_is_refused() {
    let known: Vec<u8> = Kind::ALL.iter().map(|kind| *kind as u8).collect();
    for kind in (0..=u8::MAX).filter(|byte| !known.contains(byte)) {
        assert_eq!(Header::decode(&[kind, 0, 0, 0, 0, 0, 0, 0]), Err(WireError::UnknownKind { kind }));
    }
}

#[test]
fn a_length_outside_the_limits_of_its_kind_is_refused_by_the_header_alone() {
    for kind in Kind::ALL {
        let (min, max) = kind.lengths().into_inner();
        let raw = if matches!(kind, Kind::Data | Kind::Write) { Encoding::Raw as u8 } else { 0 };
        assert!(Header::decode(&header(*kind, raw, 0, max)).is_ok(), "{kind:?} of {max} bytes");
        for length in [min.checked_sub(1), Some(max + 1), Some(u32::MAX)].into_iter().flatten() {
            let refused = Header::decode(&header(*kind, raw, 0, length));
            assert!(
                matches!(refused, Err(WireError::OutOfRange { found, .. }) if found == length.into()),
                "{kind:?} of {length} bytes"
            );
        }
    }
}

#[test]
fn content_is_required_unless_zero_and_forbidden_if_zero() {
    for kind in [Kind::Data, Kind::Write] {
        let lengths = |encoding: Encoding, length| Header::decode(&header(kind, encoding as u8, 0, length)).is_ok();
        assert!(lengths(Encoding::Zero, 16) && !lengths(Encoding::Zero, 17));
        assert!(lengths(Encoding::Raw, 17) && !lengths(Encoding::Raw, 16));
        assert!(lengths(Encoding::Lz4, 17) && !lengths(Encoding::Lz4, 16));
    }
}

#[test]
fn reserved_header_bytes_that_are_not_zero_are_refused() {
    for kind in Kind::ALL {
        let refused = Header::decode(&header(*kind, 0, 0x0100, *kind.lengths().start()));
        assert_eq!(refused, Err(WireError::Reserved { frame: kind.name(), field: "reserved", found: 0x0100 }));
    }
}

#[test]
fn flags_without_a_meaning_are_refused() {
    for kind in Kind::ALL {
        let refused = Header::decode(&header(*kind, 3, 0, *kind.lengths().end())).unwrap_err();
        let expected = match kind {
            Kind::Data | Kind::Write => WireError::OutOfRange { frame: kind.name(), field: "encoding", found: 3, min: 0, max: 2 },
            _ => WireError::Reserved { frame: kind.name(), field: "flags", found: 3 },
        };
        assert_eq!(refused, expected);
    }
}

#[test]
fn reserved_bytes_of_opened_that_are_not_zero_are_refused() {
    let refused = altered(Kind::Opened, |payload| payload[6] = 1);
    assert_eq!(refused, Err(WireError::Reserved { frame: "OPENED", field: "reserved", found: 1 }));
}

#[test]
fn a_payload_shorter_or_longer_than_its_header_says_is_refused() {
    for Golden { name, bytes, .. } in goldens() {
        for cut in HEADER_BYTES as usize..bytes.len() {
            assert!(matches!(decode(&bytes[..cut]), Err(WireError::Truncated { .. })), "{name} cut to {cut}");
        }
        let longer = [&bytes[..], &[0]].concat();
        assert!(matches!(decode(&longer), Err(WireError::Trailing { extra_bytes: 1, .. })), "{name}");
    }
}

#[test]
fn a_payload_that_ends_inside_a_field_is_refused() {
    let refused = altered(Kind::Failed, |payload| payload.truncate(10));
    assert_eq!(refused, Err(WireError::Truncated { frame: "FAILED", field: "message", needed_bytes: 12, left_bytes: 6 }));
    let refused = altered(Kind::Hello, |payload| payload[2] = 255);
    assert_eq!(refused, Err(WireError::Truncated { frame: "HELLO", field: "agent", needed_bytes: 255, left_bytes: 7 }));
    let refused = altered(Kind::Offer, |payload| payload.truncate(76));
    assert!(matches!(refused, Err(WireError::Truncated { frame: "OFFER", .. })));
}

#[test]
fn bytes_after_the_last_field_are_refused() {
    for kind in [Kind::Hello, Kind::Open, Kind::Failed, Kind::Pull, Kind::Offer, Kind::Abort] {
        let refused = altered(kind, |payload| payload.push(0));
        assert_eq!(refused, Err(WireError::Trailing { frame: kind.name(), extra_bytes: 1 }));
    }
}

#[test]
fn text_that_is_not_utf8_is_refused() {
    let refused = altered(Kind::Open, |payload| payload[2] = 0xff);
    assert_eq!(refused, Err(WireError::NotUtf8 { frame: "OPEN", field: "name", valid_bytes: 1 }));
    let refused = altered(Kind::Abort, |payload| payload[28] = 0x80);
    assert_eq!(refused, Err(WireError::NotUtf8 { frame: "ABORT", field: "message", valid_bytes: 0 }));
}

#[test]
fn text_outside_its_length_is_refused() {
    let refused = altered(Kind::Open, |payload| *payload = vec![0, b'x']);
    assert!(matches!(refused, Err(WireError::OutOfRange { field: "name", found: 0, min: 1, max: 255, .. })));
    let refused = altered(Kind::Failed, |payload| payload[3] = 0x10);
    assert!(matches!(refused, Err(WireError::OutOfRange { field: "message", found: 4108, min: 0, max: 1024, .. })));
}

#[test]
fn numbers_without_a_meaning_are_refused() {
    let refused = |kind, at: usize, value: u8| altered(kind, |payload| payload[at] = value).unwrap_err().to_string();
    assert_eq!(refused(Kind::Opened, 4, 2), "OPENED: access is 2, allowed is 0 to 1");
    assert_eq!(refused(Kind::Opened, 5, 8), "OPENED: page_shift is 8, allowed is 9 to 30");
    assert_eq!(refused(Kind::Opened, 5, 31), "OPENED: page_shift is 31, allowed is 9 to 30");
    assert_eq!(refused(Kind::Opened, 5, 255), "OPENED: page_shift is 255, allowed is 9 to 30");
    assert_eq!(refused(Kind::Lane, 0, 3), "LANE: class is 3, allowed is 0 to 2");
    assert_eq!(refused(Kind::Offer, 28, 4), "OFFER: state_bytes is 17179939184, allowed is 0 to 67108864");
}

#[test]
fn extents_must_have_pages_and_must_not_overflow() {
    for kind in [Kind::Read, Kind::Write, Kind::Data] {
        let count_at = if kind == Kind::Data { 0 } else { 4 };
        let empty = altered(kind, |payload| payload[count_at..count_at + 4].fill(0));
        assert!(matches!(empty, Err(WireError::OutOfRange { field: "count", found: 0, min: 1, .. })), "{empty:?}");
        let past = altered(kind, |payload| payload[8..16].fill(0xff));
        assert!(matches!(past, Err(WireError::ExtentOverflow { first: u64::MAX, .. })), "{past:?}");
    }
    let past = altered(Kind::Pull, |payload| payload[16..24].fill(0xff));
    assert_eq!(past, Err(WireError::ExtentOverflow { frame: "PULL", first: u64::MAX, count: 1 }));
}

#[test]
fn a_list_that_cannot_be_there_is_refused_before_it_is_allocated() {
    let refused = altered(Kind::Pull, |payload| payload[4..8].fill(0xff));
    let needed_bytes = 16 * u32::MAX as usize;
    assert_eq!(refused, Err(WireError::Truncated { frame: "PULL", field: "extents", needed_bytes, left_bytes: 32 }));
    let refused = altered(Kind::Offer, |payload| payload[32..34].fill(0xff));
    assert!(matches!(refused, Err(WireError::Truncated { frame: "OFFER", field: "regions", left_bytes: 43, .. })));
}

#[test]
fn more_regions_than_allowed_are_refused() {
    let many = |count: u16| {
        altered(Kind::Offer, |payload| {
            payload.truncate(32);
            payload.extend(count.to_le_bytes());
            (0..count).for_each(|_| payload.extend([1, b'r', 12].into_iter().chain([0; 16])));
        })
    };
    assert!(many(1024).is_ok());
    assert!(matches!(many(1025), Err(WireError::OutOfRange { field: "regions", found: 1025, max: 1024, .. })));
}

#[test]
fn senders_cannot_build_what_receivers_refuse() {
    assert!(Name::new("").is_err() && Name::new("x".repeat(256)).is_err() && Name::new("x".repeat(255)).is_ok());
    assert!(Message::new("x".repeat(1025)).is_err());
    assert!(RunExtent::new(Extent::between(0, 0)).is_err() && RunExtent::new(Extent::between(0, 1 << 32)).is_err());
    assert!(PullExtents::new(vec![Extent::page(0); 65_537]).is_err());
    assert!(StatePiece::new(Bytes::new()).is_err() && StateLength::new((64u64 << 20) + 1).is_err());
    let content = |encoding, len| EncodedRun::new(Extent::page(0), encoding, Bytes::from(vec![1; len]));
    assert!(content(Encoding::Raw, 1 << 20).is_ok() && content(Encoding::Raw, (1 << 20) + 1).is_err());
    assert!(content(Encoding::Raw, 0).is_err() && content(Encoding::Zero, 1).is_err());
    assert!(DataHead::new(Encoding::Lz4, Extent::page(0), 0, (1 << 20) + 1).is_err());
    assert_eq!(Name::new("").unwrap_err().to_string(), "outgoing frame: length of text in bytes is 0, allowed is 1 to 255");
}

#[test]
fn a_message_is_cut_between_characters() {
    let long = "x".repeat(1023) + "ö";
    assert_eq!(Message::cut(&long).len(), 1023);
    assert_eq!(&**Message::cut("short"), "short");
}

#[test]
fn pages_longer_than_a_run_are_refused() {
    let head = |count, len_bytes| DataHead::new(Encoding::Raw, Extent::between(0, count), 0, len_bytes).unwrap();
    assert_eq!(head(256, 1 << 20).decoded_len(PageSize::KIB_4), Ok(1 << 20));
    let refused = head(257, 1 << 20).decoded_len(PageSize::KIB_4);
    assert!(matches!(refused, Err(WireError::OutOfRange { found: 1_052_672, max: 1_048_576, .. })), "{refused:?}");
    let refused = head(2, 4096).decoded_len(PageSize::KIB_4);
    assert_eq!(refused, Err(WireError::ContentLength { encoding: Encoding::Raw, found_bytes: 4096, expected_bytes: 8192 }));
    let zeros = DataHead::new(Encoding::Zero, Extent::between(0, u32::MAX.into()), 0, 0).unwrap();
    assert!(zeros.decoded_len(PageSize::new(1 << 30).unwrap()).is_err());
}

#[test]
fn the_head_of_data_is_read_and_written_without_a_frame() {
    for Golden { name, frame, bytes } in goldens() {
        let header = Header::decode(bytes.first_chunk().unwrap()).unwrap();
        let Frame::Data { serve_us, run } = frame else {
            let refused = DataHead::decode(header, &[0; DATA_FIELDS_BYTES]);
            assert_eq!(refused, Err(WireError::Unexpected { found: header.kind().name(), expected: "DATA" }));
            continue;
        };
        let (head, content) = bytes.split_at(DATA_HEAD_BYTES as usize);
        let decoded = DataHead::decode(header, head[8..].try_into().unwrap()).unwrap();
        assert_eq!(
            (decoded.extent(), decoded.encoding(), decoded.len_bytes()),
            (run.extent(), run.encoding(), content.len()),
            "{name}"
        );
        assert_eq!(decoded.serve_us(), serve_us);
        assert_eq!(encode_data_head(decoded)[..], *head);
        let built = DataHead::new(run.encoding(), run.extent(), serve_us, run.bytes().len());
        assert_eq!(built, Ok(decoded));
    }
}

/// A peer is written from docs/protocol.md: what stands there must be what the code does.
#[test]
fn the_protocol_document_has_every_frame_code_and_limit() {
    let document = include_str!("../../../docs/protocol.md");
    let rows: Vec<Vec<&str>> = document.lines().map(|line| line.split('|').map(|cell| cell.trim()).collect()).collect();
    let has = |cells: &[&str]| rows.iter().any(|row| row.get(1..=cells.len()) == Some(cells));
    for kind in Kind::ALL {
        let (min, max) = kind.lengths().into_inner();
        let lengths = if min == max { format!("{min}") } else { format!("{min}..={max}") };
        let cells = [&format!("0x{:02x}", *kind as u8), kind.name(), &lengths];
        assert!(has(&cells), "no row {cells:?}");
    }
    for (name, value) in LIMITS {
        let cells = [&format!("`{name}`"), value.to_string().as_str()].map(|cell| cell.to_string());
        assert!(has(&cells.each_ref().map(String::as_str)), "no row {cells:?}");
    }
    for (code, name) in ERROR_CODES {
        assert!(has(&[&code.to_string(), name]), "no row {code} {name}");
        assert_eq!(u16::from(ErrorCode::from(*code)), *code);
    }
    let frames = rows.iter().filter(|row| row.get(1).is_some_and(|cell| cell.starts_with("0x"))).count();
    assert_eq!(frames, Kind::ALL.len(), "the document has a frame that the code has not");
}

/// Run by hand after a change of the frames, see fuzz/README.md.
#[test]
#[ignore = "writes fuzz/corpus/wire_decode"]
fn write_the_seed_corpus() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/wire_decode");
    for Golden { name, bytes, .. } in goldens() {
        std::fs::write(folder.join(name), bytes).unwrap();
    }
    let stream: Vec<u8> = goldens().into_iter().flat_map(|golden| golden.bytes).collect();
    std::fs::write(folder.join("every_frame"), stream).unwrap();
}
