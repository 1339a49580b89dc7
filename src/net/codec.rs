//! Decisions: the content of pages to bytes on the wire and back.
//!
//! Role: zeros travel as nothing, what LZ4 shrinks well travels shrunk, the rest as it is without a copy. Neighbours: `net`'s
//! streams use it beside [`wire`](super::wire). Invariants: decoding gives exactly the length asked for or fails, and allocates
//! no more than that; a length that LZ4 cannot reach is refused before anything is allocated (S7).

use super::wire::{Encoding, MAX_RUN_BYTES, WireError};
use crate::{Content, Extent, PageSize, Run};
use bytes::Bytes;
use lz4_flex::block::{compress_into, decompress_into, get_maximum_output_size};
use std::cell::RefCell;

/// How much of a run is compressed first; if that does not shrink at all, the rest is not tried. Measured with runs of 64 KiB:
/// noise passes at 46 GB/s instead of 13, what is compressed loses 5 %. Asking more of the sample than to shrink would be
/// wrong: text that LZ4 brings to 62 % of 64 KiB is at 88 % after the first page, when there was little yet to repeat.
const SAMPLE_BYTES: usize = 4096;

/// No LZ4 block decodes to more than this many times its length: a byte of a long match adds at most 255.
const LZ4_MAX_RATIO: usize = 255;

/// Encodes the content of a run; with `compress`, by LZ4 if that saves at least an eighth.
pub(crate) fn encode_run(content: Content, compress: bool) -> (Encoding, Bytes) {
    match content {
        Content::Zero => (Encoding::Zero, Bytes::new()),
        Content::Bytes(bytes) if is_zero(&bytes) => (Encoding::Zero, Bytes::new()),
        Content::Bytes(bytes) => match compress.then(|| compressed(&bytes)).flatten() {
            Some(shorter) => (Encoding::Lz4, shorter),
            None => (Encoding::Raw, bytes),
        },
    }
}

/// Decodes the content of pages that are `decoded_len` bytes long.
///
/// # Errors
/// [`WireError::ContentLength`] if the content is too long or too short for its pages, [`WireError::OutOfRange`] if the pages
/// are longer than [`MAX_RUN_BYTES`], [`WireError::BrokenContent`] if LZ4 refuses it.
pub(crate) fn decode_run(encoding: Encoding, bytes: Bytes, decoded_len: usize) -> Result<Content, WireError> {
    let (found_bytes, expected_bytes) = (bytes.len(), decoded_len);
    let wrong_length = Err(WireError::ContentLength { encoding, found_bytes, expected_bytes });
    if decoded_len > MAX_RUN_BYTES as usize {
        return Err(WireError::OutOfRange {
            frame: "run",
            field: "length of pages in bytes",
            found: decoded_len as u64,
            min: 1,
            max: MAX_RUN_BYTES.into(),
        });
    }
    match encoding {
        Encoding::Zero if bytes.is_empty() => Ok(Content::Zero),
        Encoding::Raw if found_bytes == expected_bytes => Ok(Content::Bytes(bytes)),
        Encoding::Lz4 if expected_bytes <= found_bytes.saturating_mul(LZ4_MAX_RATIO) => {
            let mut pages = vec![0; expected_bytes];
            match decompress_into(&bytes, &mut pages) {
                Ok(written_bytes) if written_bytes == expected_bytes => Ok(Content::Bytes(pages.into())),
                Ok(_) => wrong_length,
                Err(error) => Err(WireError::BrokenContent { found_bytes, expected_bytes, reason: error.to_string() }),
            }
        }
        _ => wrong_length,
    }
}

/// What is compressed on a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compress {
    Nothing,
    /// What costs less than sending it does on any path: [`Shrinks::ToNothing`].
    Little,
    All,
}

/// Whether a run is worth compressing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shrinks {
    No,
    /// If the path is slower than compressing.
    Well,
    /// Almost all of it is zero: it shrinks faster than it could be encrypted.
    ToNothing,
}

/// Cuts a run where its pages change between zero, likely to shrink and unlikely to, so that each kind is sent in its own way. What is not
/// to be compressed is not looked into.
pub(crate) fn kinds_of(run: Run, page: PageSize, compress: Compress) -> Vec<(Shrinks, Run)> {
    let Content::Bytes(bytes) = &run.content else { return vec![(Shrinks::No, run)] };
    let mut kinds = bytes.chunks(page.len()).map(|bytes| Kind::of(bytes, compress));
    let mut parts: Vec<(Kind, u64)> = Vec::new();
    for kind in &mut kinds {
        match parts.last_mut() {
            Some((last, count)) if *last == kind => *count += 1,
            _ => parts.push((kind, 1)),
        }
    }
    let mut first = run.extent.first();
    let mut rest = bytes.clone();
    let cut = |(kind, count): (Kind, u64)| {
        let extent = Extent::between(first, first + count);
        first = extent.end();
        let len = usize::try_from(extent.bytes(page)).unwrap_or(usize::MAX).min(rest.len());
        let bytes = rest.split_to(len);
        match kind {
            Kind::Zero => (Shrinks::No, Run::zero(extent)),
            Kind::Full(shrinks) => (shrinks, Run::bytes(extent, bytes)),
        }
    };
    parts.into_iter().map(cut).collect()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Zero,
    Full(Shrinks),
}

impl Kind {
    /// Judged by 16 bytes in each quarter of the page: of 64 random bytes about 57 differ (never, in practice, fewer than 46); text has fewer than 30 different
    /// values, tables of numbers and code fewer than 40. More bytes judge no better, and looking at them costs as much as encrypting the page.
    fn of(page: &[u8], compress: Compress) -> Kind {
        const NOISE_VALUES: u32 = 46;
        if is_zero(page) {
            return Kind::Zero;
        }
        if compress == Compress::Nothing {
            return Kind::Full(Shrinks::No);
        }
        let samples = || page.chunks(page.len() / 4).filter_map(|quarter| quarter.first_chunk::<16>());
        // A counter or a few words in a page that was cleared.
        if samples().filter(|bytes| **bytes == [0; 16]).count() >= 3 {
            return Kind::Full(Shrinks::ToNothing);
        }
        if compress == Compress::Little {
            return Kind::Full(Shrinks::No);
        }
        let mut seen = [0u64; 4];
        for byte in samples().flatten() {
            seen[usize::from(byte >> 6)] |= 1 << (byte & 63);
        }
        let values: u32 = seen.iter().map(|word| word.count_ones()).sum();
        Kind::Full(if values >= NOISE_VALUES { Shrinks::No } else { Shrinks::Well })
    }
}

/// Whether every byte is zero. Stops at the first 128 bytes that are not.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // Or-ing words of a fixed-size chunk is what the compiler turns into vector instructions.
    let (chunks, rest) = bytes.as_chunks::<128>();
    chunks.iter().all(|chunk| chunk.as_chunks::<8>().0.iter().fold(0, |all, word| all | u64::from_ne_bytes(*word)) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

/// The LZ4 block, if it saves an eighth.
fn compressed(bytes: &[u8]) -> Option<Bytes> {
    thread_local! {
        /// Kept between runs: fresh memory would be faulted in for each.
        static OUT: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    OUT.with_borrow_mut(|out| {
        out.resize(get_maximum_output_size(bytes.len()).max(out.len()), 0);
        let mut compress = |bytes: &[u8], saving: usize| compress_into(bytes, out).ok().filter(|len| len + saving <= bytes.len());
        if let Some((sample, [_, ..])) = bytes.split_at_checked(SAMPLE_BYTES) {
            compress(sample, 1)?;
        }
        let len = compress(bytes, bytes.len().div_ceil(8))?;
        Some(Bytes::copy_from_slice(&out[..len]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};

    fn bytes(bytes: impl Into<Bytes>) -> Content {
        Content::Bytes(bytes.into())
    }

    /// Bytes that no compressor shrinks (xorshift).
    fn noise(len: usize) -> Vec<u8> {
        let mut word = 0x2545_f491_4f6c_dd1d_u64;
        let mut next = || {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            word.to_le_bytes()
        };
        (0..len / 8).flat_map(|_| next()).collect()
    }

    fn text(len: usize) -> Vec<u8> {
        (0u32..).flat_map(|line| format!("line {line} of a log that says little new\n").into_bytes()).take(len).collect()
    }

    #[test]
    fn a_byte_anywhere_makes_a_run_not_zero() {
        for len in [0, 1, 7, 127, 128, 129, 300] {
            let mut page = vec![0; len];
            assert!(is_zero(&page));
            for at in 0..len {
                page[at] = 0x80;
                assert!(!is_zero(&page), "{len} bytes, {at}");
                page[at] = 0;
            }
        }
    }

    #[test]
    fn pages_are_sorted_by_what_compressing_them_gains() {
        let mut counter = vec![0; 4096];
        counter[5] = 7;
        let pages = [vec![0; 4096], counter.clone(), noise(4096), text(4096), counter].concat();
        let sorted = |compress| {
            let kinds = kinds_of(Run::bytes(Extent::between(3, 8), pages.clone().into()), PageSize::KIB_4, compress);
            let said = |(shrinks, run): &(Shrinks, Run)| (run.extent, run.content == Content::Zero, *shrinks);
            kinds.iter().map(said).collect::<Vec<_>>()
        };
        let zero = (Extent::page(3), true, Shrinks::No);
        assert_eq!(sorted(Compress::Nothing), [zero, (Extent::between(4, 8), false, Shrinks::No)]);
        let to_nothing = |page| (Extent::page(page), false, Shrinks::ToNothing);
        assert_eq!(sorted(Compress::Little), [zero, to_nothing(4), (Extent::between(5, 7), false, Shrinks::No), to_nothing(7)]);
        let (five, six) = ((Extent::page(5), false, Shrinks::No), (Extent::page(6), false, Shrinks::Well));
        assert_eq!(sorted(Compress::All), [zero, to_nothing(4), five, six, to_nothing(7)]);
    }

    #[test]
    fn zeros_travel_as_nothing() {
        assert_eq!(encode_run(bytes(vec![0; 8192]), false), (Encoding::Zero, Bytes::new()));
        assert_eq!(encode_run(Content::Zero, true), (Encoding::Zero, Bytes::new()));
        assert_eq!(decode_run(Encoding::Zero, Bytes::new(), 8192), Ok(Content::Zero));
    }

    #[test]
    fn raw_pages_are_not_copied() {
        let page = Bytes::from(noise(4096));
        for compress in [false, true] {
            let (encoding, sent) = encode_run(Content::Bytes(page.clone()), compress);
            assert_eq!((encoding, sent.as_ptr()), (Encoding::Raw, page.as_ptr()));
            let Ok(Content::Bytes(got)) = decode_run(encoding, sent, 4096) else { panic!("raw pages decode") };
            assert_eq!(got.as_ptr(), page.as_ptr());
        }
    }

    #[test]
    fn lz4_is_kept_from_an_eighth_saved() {
        // A page of noise with an end of zeros: about `4096 - zeros` bytes as lz4.
        let page = |zeros: usize| [noise(4096 - zeros), vec![0; zeros]].concat();
        let (encoding, sent) = encode_run(bytes(page(640)), true);
        assert!(encoding == Encoding::Lz4 && sent.len() <= 3584, "{encoding:?} {}", sent.len());
        assert_eq!(encode_run(bytes(page(384)), true).0, Encoding::Raw);
        assert_eq!(encode_run(bytes(page(640)), false).0, Encoding::Raw);
    }

    #[test]
    fn a_run_whose_first_page_does_not_shrink_is_not_compressed() {
        assert_eq!(encode_run(bytes([noise(4096), text(61_440)].concat()), true).0, Encoding::Raw);
        let hardly = [noise(3840), vec![0; 256]].concat();
        assert_eq!(encode_run(bytes([hardly, text(61_440)].concat()), true).0, Encoding::Lz4);
        assert_eq!(encode_run(bytes([text(61_440), noise(4096)].concat()), true).0, Encoding::Lz4);
        assert_eq!(encode_run(bytes([text(4096), noise(61_440)].concat()), true).0, Encoding::Raw);
    }

    #[test]
    fn content_of_another_length_is_refused() {
        let (_, sent) = encode_run(bytes(text(8192)), true);
        for (encoding, sent) in [(Encoding::Zero, &sent), (Encoding::Raw, &sent), (Encoding::Lz4, &sent)] {
            for len in [0, 4096, 8191, 8193, 16384] {
                let refused = decode_run(encoding, sent.clone(), len);
                assert!(
                    matches!(refused, Err(WireError::ContentLength { .. } | WireError::BrokenContent { .. })),
                    "{encoding:?} {len}: {refused:?}"
                );
            }
        }
        assert!(decode_run(Encoding::Lz4, sent, 8192).is_ok());
    }

    #[test]
    fn a_bomb_is_refused_by_its_length_alone() {
        let block = Bytes::from(vec![0xff; 100]);
        let refused = decode_run(Encoding::Lz4, block.clone(), 25_501);
        assert_eq!(refused, Err(WireError::ContentLength { encoding: Encoding::Lz4, found_bytes: 100, expected_bytes: 25_501 }));
        let refused = decode_run(Encoding::Lz4, block, usize::MAX);
        assert!(matches!(refused, Err(WireError::OutOfRange { max: 1_048_576, .. })), "{refused:?}");
    }

    #[test]
    fn the_best_compressible_run_stays_below_the_ratio_that_is_refused() {
        let run = vec![7; MAX_RUN_BYTES as usize];
        let (encoding, sent) = encode_run(bytes(run.clone()), true);
        assert!(sent.len() < 4200, "{} bytes: the bound is meant to be close", sent.len());
        assert_eq!(decode_run(encoding, sent, run.len()), Ok(bytes(run)));
    }

    proptest! {
        #[test]
        fn content_survives_the_wire(pages in vec((0usize..4, any::<u8>()), 1..20), odd_bytes in 0usize..9, compress: bool) {
            let page = |(kind, byte)| match kind {
                0 => vec![0; 4096],
                1 => noise(4096),
                2 => text(4096),
                _ => [vec![byte; 1000], noise(2096), vec![0; 1000]].concat(),
            };
            let pages: Bytes = pages.into_iter().flat_map(page).chain(vec![0; odd_bytes]).collect();
            let (encoding, sent) = encode_run(Content::Bytes(pages.clone()), compress);
            prop_assert!(sent.len() <= pages.len());
            let expected = if pages.iter().all(|byte| *byte == 0) { Content::Zero } else { Content::Bytes(pages.clone()) };
            prop_assert_eq!(decode_run(encoding, sent, pages.len()), Ok(expected));
        }

        #[test]
        fn any_lz4_block_is_exact_or_an_error(block in vec(any::<u8>(), 0..300), len in 0usize..80_000) {
            if let Ok(content) = decode_run(Encoding::Lz4, block.into(), len) {
                prop_assert!(matches!(content, Content::Bytes(pages) if pages.len() == len));
            }
        }
    }
}
