//! Random frames and random bytes.

use super::{golden::run_extent_of, *};
use proptest::{collection::vec, prelude::*};

fn text<const MIN: u32, const MAX: u32>() -> impl Strategy<Value = Limited<Box<str>, MIN, MAX>> {
    // Up to four bytes a character: lengths reach the limit.
    vec(any::<char>(), MIN as usize..=MAX as usize / 4).prop_map(|chars| {
        let text: String = chars.into_iter().collect();
        Limited::new(text).unwrap()
    })
}

fn extent() -> impl Strategy<Value = Extent> {
    (any::<u64>(), any::<u64>()).prop_map(|(a, b)| Extent::between(a.min(b), a.max(b)))
}

fn run_extent() -> impl Strategy<Value = RunExtent> {
    (0..u64::MAX - u64::from(u32::MAX), 1..=u32::MAX).prop_map(|(first, count)| run_extent_of(first, count.into()))
}

fn run() -> impl Strategy<Value = EncodedRun> {
    let content = prop_oneof![
        Just((Encoding::Zero, vec![])),
        vec(any::<u8>(), 1..3000).prop_map(|bytes| (Encoding::Raw, bytes)),
        vec(any::<u8>(), 1..3000).prop_map(|bytes| (Encoding::Lz4, bytes)),
    ];
    (run_extent(), content).prop_map(|(extent, (encoding, bytes))| EncodedRun::new(*extent, encoding, bytes.into()).unwrap())
}

fn page_size() -> impl Strategy<Value = PageSize> {
    (9u32..=30).prop_map(|shift| PageSize::new(1 << shift).unwrap())
}

fn access() -> impl Strategy<Value = Access> {
    prop_oneof![Just(Access::Read), Just(Access::ReadWrite)]
}

fn class() -> impl Strategy<Value = Class> {
    prop_oneof![Just(Class::Background), Just(Class::Behind), Just(Class::Demand)]
}

fn code() -> impl Strategy<Value = ErrorCode> {
    prop_oneof![0u16..12, any::<u16>()].prop_map(ErrorCode::from)
}

fn region() -> impl Strategy<Value = OfferedRegion> {
    (text(), page_size(), any::<u64>(), any::<u64>()).prop_map(|(name, page_size, size_bytes, address)| OfferedRegion {
        name,
        page_size,
        size_bytes,
        address,
    })
}

fn turn() -> impl Strategy<Value = (u128, u64)> {
    any::<(u128, u64)>()
}

fn frame(kind: Kind) -> BoxedStrategy<Frame> {
    match kind {
        Kind::Hello => (any::<u16>(), text()).prop_map(|(version, agent)| Frame::Hello { version, agent }).boxed(),
        Kind::Welcome => (any::<u16>(), text()).prop_map(|(version, agent)| Frame::Welcome { version, agent }).boxed(),
        Kind::Open => text().prop_map(|name| Frame::Open { name }).boxed(),
        Kind::Opened => (any::<u32>(), access(), page_size(), any::<u64>())
            .prop_map(|(region, access, page_size, size_bytes)| Frame::Opened { region, access, page_size, size_bytes })
            .boxed(),
        Kind::Failed => (code(), text()).prop_map(|(code, message)| Frame::Failed { code, message }).boxed(),
        Kind::Lane => class().prop_map(|class| Frame::Lane { class }).boxed(),
        Kind::Read => (any::<u32>(), run_extent()).prop_map(|(region, extent)| Frame::Read { region, extent }).boxed(),
        Kind::Data => (any::<u32>(), run()).prop_map(|(serve_us, run)| Frame::Data { serve_us, run }).boxed(),
        Kind::Write => (any::<u32>(), run()).prop_map(|(region, run)| Frame::Write { region, run }).boxed(),
        Kind::Flush => any::<u32>().prop_map(|region| Frame::Flush { region }).boxed(),
        Kind::Done => Just(Frame::Done).boxed(),
        Kind::Pull => (any::<u32>(), any::<u64>(), vec(extent(), 0..100))
            .prop_map(|(region, credit_bytes, extents)| {
                let extents = PullExtents::new(extents).unwrap();
                Frame::Pull { region, credit_bytes, extents }
            })
            .boxed(),
        Kind::Credit => any::<u64>().prop_map(|total_bytes| Frame::Credit { total_bytes }).boxed(),
        Kind::End => Just(Frame::End).boxed(),
        Kind::Take => (any::<u128>(), 0u8..4, 0u8..2, any::<(u16, u32, u64, u64)>())
            .prop_map(|(session, kind, at_limit, (round_limit, downtime_limit_us, time_limit_ms, behind_bytes))| {
                let kind = MoveKind::of_byte("", kind).unwrap();
                let at_limit = AtLimit::of_byte("", at_limit).unwrap();
                Frame::Take { session, plan: Plan { kind, at_limit, round_limit, downtime_limit_us, time_limit_ms, behind_bytes } }
            })
            .boxed(),
        Kind::Offer => (turn(), 0..=u64::from(MAX_STATE_BYTES), vec(region(), 0..20))
            .prop_map(|((session, epoch), state_bytes, regions)| {
                let (state_bytes, regions) = (StateLength::new(state_bytes).unwrap(), OfferedRegions::new(regions).unwrap());
                Frame::Offer { session, epoch, state_bytes, regions }
            })
            .boxed(),
        Kind::State => vec(any::<u8>(), 1..3000).prop_map(|bytes| Frame::State { bytes: StatePiece::new(bytes).unwrap() }).boxed(),
        Kind::Ready => turn().prop_map(|(session, epoch)| Frame::Ready { session, epoch }).boxed(),
        Kind::Commit => turn().prop_map(|(session, epoch)| Frame::Commit { session, epoch }).boxed(),
        Kind::Resumed => turn().prop_map(|(session, epoch)| Frame::Resumed { session, epoch }).boxed(),
        Kind::Complete => turn().prop_map(|(session, epoch)| Frame::Complete { session, epoch }).boxed(),
        Kind::Released => turn().prop_map(|(session, epoch)| Frame::Released { session, epoch }).boxed(),
        Kind::Promote => turn().prop_map(|(session, epoch)| Frame::Promote { session, epoch }).boxed(),
        Kind::Depose => turn().prop_map(|(session, epoch)| Frame::Depose { session, epoch }).boxed(),
        Kind::Deposed => turn().prop_map(|(session, epoch)| Frame::Deposed { session, epoch }).boxed(),
        Kind::Mark => any::<u64>().prop_map(|number| Frame::Mark { number }).boxed(),
        Kind::Kept => (turn(), any::<u64>()).prop_map(|((session, epoch), number)| Frame::Kept { session, epoch, number }).boxed(),
        Kind::Point => (turn(), any::<(u64, u64)>(), 0..=u64::from(MAX_STATE_BYTES))
            .prop_map(|((session, epoch), (number, age_us), state_bytes)| {
                let state_bytes = StateLength::new(state_bytes).unwrap();
                Frame::Point { session, epoch, number, age_us, state_bytes }
            })
            .boxed(),
        Kind::Feed => (turn(), any::<(u32, u64)>())
            .prop_map(|((session, epoch), (region, credit_bytes))| Frame::Feed { session, epoch, region, credit_bytes })
            .boxed(),
        Kind::Lacks => (any::<bool>(), vec(extent(), 0..100))
            .prop_map(|(more, extents)| Frame::Lacks { more, extents: PullExtents::new(extents).unwrap() })
            .boxed(),
        Kind::Progress => (turn(), any::<u32>(), any::<[u64; 4]>())
            .prop_map(|((session, epoch), round, [owed_bytes, dirty_bytes_s, bandwidth_bytes_s, predicted_us])| {
                let copying = Copying { round, owed_bytes, dirty_bytes_s, bandwidth_bytes_s, predicted_us };
                Frame::Progress { session, epoch, copying }
            })
            .boxed(),
        Kind::Mapped => {
            (turn(), any::<u64>()).prop_map(|((session, epoch), since)| Frame::Mapped { session, epoch, since }).boxed()
        }
        Kind::Prepare => (turn(), 0..=u64::from(MAX_STATE_BYTES))
            .prop_map(|((session, epoch), state_bytes)| Frame::Prepare {
                session,
                epoch,
                state_bytes: StateLength::new(state_bytes).unwrap(),
            })
            .boxed(),
        Kind::Abort => (turn(), code(), text())
            .prop_map(|((session, epoch), code, message)| Frame::Abort { session, epoch, code, message })
            .boxed(),
    }
}

/// One frame of every kind.
fn one_of_each() -> impl Strategy<Value = Vec<Frame>> {
    Kind::ALL.iter().map(|kind| frame(*kind)).collect::<Vec<_>>()
}

/// Bytes that a frame made by decoding holds on the heap beyond the payload's buffer.
fn heap_bytes(frame: &Frame) -> usize {
    match frame {
        Frame::Hello { agent, .. } | Frame::Welcome { agent, .. } => agent.len(),
        Frame::Open { name } => name.len(),
        Frame::Failed { message, .. } | Frame::Abort { message, .. } => message.len(),
        Frame::Pull { extents, .. } | Frame::Lacks { extents, .. } => extents.capacity() * size_of::<Extent>(),
        Frame::Offer { regions, .. } => {
            regions.capacity() * size_of::<OfferedRegion>() + regions.iter().map(|region| region.name.len()).sum::<usize>()
        }
        _ => 0,
    }
}

/// Random payloads behind headers that let them through.
fn plausible() -> impl Strategy<Value = (Header, Vec<u8>)> {
    let kinds = prop::sample::select(Kind::ALL);
    (kinds, 0u8..3, 0u32..600).prop_flat_map(|(kind, encoding, more)| {
        let (min, max) = kind.lengths().into_inner();
        let (flags, length) = match kind {
            Kind::Data | Kind::Write if encoding == 0 => (0, min),
            Kind::Data | Kind::Write => (encoding, min + 1 + more),
            _ => (0, (min + more).min(max)),
        };
        let header = Header::decode(&header(kind, flags, 0, length)).unwrap();
        // Small numbers are what counts and lengths need to get anywhere.
        let byte = prop_oneof![4 => Just(0u8), 2 => 0u8..32, 1 => any::<u8>()];
        (Just(header), vec(byte, length as usize))
    })
}

proptest! {
    #[test]
    fn every_frame_survives_the_wire(frames in one_of_each()) {
        for frame in frames {
            let bytes = encode(&frame);
            let header = Header::decode(bytes.first_chunk().unwrap()).unwrap();
            prop_assert_eq!(header.kind(), frame.kind());
            prop_assert_eq!(header.length() as usize, bytes.len() - HEADER_BYTES as usize);
            prop_assert_eq!(decode(&bytes), Ok(frame));
        }
    }

    #[test]
    fn any_eight_bytes_are_a_header_or_an_error(bytes: [u8; 8]) {
        if let Ok(header) = Header::decode(&bytes) {
            prop_assert_eq!(header.encode(), bytes);
            prop_assert!(header.kind().lengths().contains(&header.length()));
        }
    }

    #[test]
    fn any_payload_is_a_frame_or_an_error_and_allocates_within_the_limit((header, payload) in plausible()) {
        if let Ok(frame) = Frame::decode(header, Bytes::from(payload.clone())) {
            prop_assert!(heap_bytes(&frame) <= *header.kind().lengths().end() as usize);
            prop_assert_eq!(&encode(&frame)[HEADER_BYTES as usize..], &payload[..]);
        }
    }
}

#[test]
fn the_largest_lists_allocate_no_more_than_the_longest_payload() {
    let extents = PullExtents::new(vec![Extent::page(1); MAX_PULL_EXTENTS as usize]).unwrap();
    let pull = Frame::Pull { region: 0, credit_bytes: 0, extents };
    let region = OfferedRegion { name: Name::new("r").unwrap(), page_size: PageSize::KIB_4, size_bytes: 0, address: 0 };
    let regions = OfferedRegions::new(vec![region; MAX_OFFER_REGIONS as usize]).unwrap();
    let offer = Frame::Offer { session: 0, epoch: 0, state_bytes: StateLength::new(0u64).unwrap(), regions };
    for frame in [pull, offer] {
        let decoded = decode(&encode(&frame)).unwrap();
        assert!(heap_bytes(&decoded) <= *frame.kind().lengths().end() as usize, "{} bytes", heap_bytes(&decoded));
        assert_eq!(decoded, frame);
    }
}

#[test]
fn content_and_state_are_not_copied() {
    let inside = |buffer: &Bytes, part: &Bytes| buffer.as_ptr_range().contains(&part.as_ptr());
    for Golden { name, bytes, .. } in goldens() {
        let payload = Bytes::copy_from_slice(&bytes[HEADER_BYTES as usize..]);
        match Frame::decode(Header::decode(bytes.first_chunk().unwrap()).unwrap(), payload.clone()).unwrap() {
            Frame::Data { run, .. } | Frame::Write { run, .. } => {
                assert!(run.bytes().is_empty() || inside(&payload, run.bytes()), "{name}");
            }
            Frame::State { bytes } => assert!(inside(&payload, &bytes), "{name}"),
            _ => {}
        }
    }
}
