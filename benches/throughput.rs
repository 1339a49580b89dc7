//! How fast a region fills: in bare installs, by sequential touch, over plain quinn, and by a pull from a peer.
//!
//! Role: what bulk transfer reaches of what the kernel and QUIC can do here. Neighbours: `common`; benches/README.md says what each key
//! is. Invariants: each case starts every round with an empty region and a new connection; bytes are checked after the clock has stopped.

mod common;

use common::{
    MIB, PAGE_BYTES, Result,
    args::Args,
    bounds::bounds,
    measure::{Case, Measured, a_gib, in_rounds, mb_s},
    pages::Image,
    plain_quinn::{ETHERNET_MTU, JUMBO_MTU, Options, download, install},
    raw::{self, RawRegion},
    server::{Content, Server},
};
use lz4_flex::block::{compress_into, decompress_into, get_maximum_output_size};
use pageferry::{MemoryStore, PULL_EXTENT_BYTES, PageSize, Pager, PagerOptions, Region};
use std::{cell::RefCell, process::ExitCode, sync::atomic::Ordering::Relaxed, time::Instant};

const SEED: u64 = 0x2;
/// Odd, so that a median is a round's figure.
const ROUNDS: usize = 5;

/// As much text is compressed in a round: a fraction of a second.
const LZ4_BYTES: usize = 64 * MIB as usize;

fn main() -> ExitCode {
    common::run("throughput", bench)
}

fn bench(args: &Args) -> Result<Measured> {
    let bytes = args.bulk_bytes();
    let image = Image::incompressible(bytes, SEED);
    let source = image.bytes();
    let store = MemoryStore::from_bytes(source.clone(), PageSize::KIB_4);
    let server = RefCell::new(Server::start(Content::Incompressible, bytes, SEED)?);
    let quinn = |options| Ok(download(&mut server.borrow_mut(), options, bytes)?.to_vec());
    let quinn_install = |options| Ok(install(&mut server.borrow_mut(), options, bytes)?.to_vec());
    let [ethernet, jumbo] = [ETHERNET_MTU, JUMBO_MTU].map(|mtu| Options::Tuned { mtu });
    let vm_like = RefCell::new(Server::start(Content::VmLike, bytes, SEED)?);
    let text = vm_like.borrow().image().text_runs(PULL_EXTENT_BYTES / PAGE_BYTES, LZ4_BYTES);
    let mut cases = vec![
        Case::new(["copy_mb_s", "copy_cpu_s_gib"], |_| Ok(copy(&image, &source)?.to_vec())),
        Case::new(["store_seq_mb_s"], |_| Ok(vec![store_seq(&image, &store)?])),
        Case::new(["quinn_stock_mb_s", "quinn_stock_cpu_s_gib"], |_| quinn(Options::Stock)),
        Case::new(["quinn_mb_s", "quinn_cpu_s_gib"], |_| quinn(ethernet)),
        Case::new(["quinn_install_mb_s", "quinn_install_cpu_s_gib"], |_| quinn_install(ethernet)),
        Case::new(["quinn_jumbo_mb_s", "quinn_jumbo_cpu_s_gib"], |_| quinn(jumbo)),
        Case::new(["quinn_jumbo_install_mb_s", "quinn_jumbo_install_cpu_s_gib"], |_| quinn_install(jumbo)),
    ];
    cases.extend(pull::cases(&server, &vm_like));
    let mut cases: Vec<Case> = cases.into_iter().map(|case| case.after(|| raw::have_memory(bytes))).collect();
    // What these two do takes no memory to speak of.
    cases.push(Case::new(["zero_cpu_s_gib"], |_| Ok(vec![zero(bytes)?])));
    cases.push(Case::new(["lz4_text_cpu_s_gib", "lz4_text_ratio"], |_| Ok(lz4(&text)?.to_vec())));
    let mut measured = in_rounds(args, ROUNDS, cases)?;
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    for bound in bounds(cpus, &|key| measured.median(key)) {
        measured.derived.push((bound.key, bound.mb_s));
        measured.notes.push(bound.note);
    }
    measured.notes.push(format!("{} MiB a case and round; MTU {ETHERNET_MTU}, jumbo {JUMBO_MTU}, loopback.", bytes / MIB));
    measured.notes.push(format!("The VM-like image: {}.", Image::vm_like(bytes, SEED).describe()));
    Ok(measured)
}

/// `UFFDIO_COPY` and nothing else, from a buffer that is there into a region that is not.
fn copy(image: &Image, source: &[u8]) -> Result<[f64; 2]> {
    const STEP: usize = MIB as usize;
    let region = RawRegion::new(source.len())?;
    let (cpu_before_s, start) = (raw::cpu_s(), Instant::now());
    for (step, bytes) in source.chunks(STEP).enumerate() {
        region.install(step * STEP, bytes)?;
    }
    let figures = [mb_s(source.len() as u64, start), a_gib(raw::cpu_s() - cpu_before_s, source.len() as u64)];
    image.check(0..image.pages(), |page, into| {
        region.read((page * PAGE_BYTES) as usize, into);
        Ok(())
    })?;
    Ok(figures)
}

/// `UFFDIO_ZEROPAGE` and nothing else: CPU seconds a GiB.
fn zero(bytes: u64) -> Result<f64> {
    let region = RawRegion::new(usize::try_from(bytes)?)?;
    let cpu_before_s = raw::cpu_s();
    for offset in (0..bytes).step_by(MIB as usize) {
        region.zero(offset as usize, MIB as usize)?;
    }
    let cpu_s = raw::cpu_s() - cpu_before_s;
    let mut page = vec![0; PAGE_BYTES as usize];
    for offset in (0..bytes).step_by(page.len()) {
        region.read(offset as usize, &mut page);
        if page.iter().any(|byte| *byte != 0) {
            return Err(format!("the page of zeros at byte {offset} is none").into());
        }
    }
    Ok(a_gib(cpu_s, bytes))
}

/// LZ4 and back, run by run, by the library's own crate: CPU seconds a GiB of text, and how many times shorter it gets.
fn lz4(runs: &[Vec<u8>]) -> Result<[f64; 2]> {
    let longest = runs.iter().map(Vec::len).max().ok_or("an image without text")?;
    let (mut packed, mut unpacked) = (vec![0; get_maximum_output_size(longest)], vec![0; longest]);
    let (mut cpu_s, mut bytes, mut packed_bytes) = (0.0, 0, 0);
    for run in runs {
        let cpu_before_s = raw::cpu_s();
        let len = compress_into(run, &mut packed)?;
        let unpacked_len = decompress_into(&packed[..len], &mut unpacked)?;
        cpu_s += raw::cpu_s() - cpu_before_s;
        if unpacked[..unpacked_len] != run[..] {
            return Err("text came back from LZ4 as something else".into());
        }
        (bytes, packed_bytes) = (bytes + run.len(), packed_bytes + len);
    }
    Ok([a_gib(cpu_s, bytes as u64), bytes as f64 / packed_bytes as f64])
}

/// A program that reads its memory from end to end.
fn store_seq(image: &Image, store: &MemoryStore) -> Result<f64> {
    let pager = Pager::start(&PagerOptions::default())?;
    let region = Region::builder().store(store.clone()).pager(&pager).open()?;
    let words = region.atomics_u64(0, region.len() / 8)?;
    let start = Instant::now();
    for page in 0..image.pages() {
        let (at, wanted) = image.probe(page);
        let got = words[(page * PAGE_BYTES / 8) as usize + at].load(Relaxed);
        if got != wanted {
            return Err(format!("page {page} gave {got:#x} for {wanted:#x} when touched").into());
        }
    }
    let rate = mb_s(region.size_bytes(), start);
    image.check(0..image.pages(), |page, into| Ok(region.read_at(page * PAGE_BYTES, into)?))?;
    Ok(rate)
}

/// Background pulls over QUIC.
mod pull {
    use super::{Case, ETHERNET_MTU, Instant, JUMBO_MTU, Options, RefCell, Result, Server, a_gib, mb_s};
    use crate::common::quic::{Ferry, check};
    use pageferry::DEFAULT_POLL_BUDGET;

    pub(crate) fn cases<'a>(server: &'a RefCell<Server>, vm_like: &'a RefCell<Server>) -> [Case<'a>; 3] {
        let [ethernet, jumbo] = [ETHERNET_MTU, JUMBO_MTU].map(|mtu| Options::Tuned { mtu });
        [
            Case::new(["pull_mb_s", "pull_cpu_s_gib"], move |_| Ok(pull(&mut server.borrow_mut(), ethernet)?.to_vec())),
            Case::new(["pull_jumbo_mb_s", "pull_jumbo_cpu_s_gib"], move |_| Ok(pull(&mut server.borrow_mut(), jumbo)?.to_vec())),
            Case::new(["pull_vmlike_mb_s", "pull_vmlike_cpu_s_gib"], move |_| {
                Ok(pull(&mut vm_like.borrow_mut(), ethernet)?.to_vec())
            }),
        ]
    }

    /// Megabytes a second until all is resident, and CPU seconds of both processes a GiB.
    fn pull(server: &mut Server, options: Options) -> Result<[f64; 2]> {
        let ferry = Ferry::connect(server, options, DEFAULT_POLL_BUDGET)?;
        ferry.warm_up(server)?;
        let region = ferry.region().open()?;
        let cpu_before_s = server.cpu_of_both_s()?;
        let start = Instant::now();
        ferry.pull(&region)?;
        let rate = mb_s(region.size_bytes(), start);
        let cpu_s = server.cpu_of_both_s()? - cpu_before_s;
        check(server, &region, region.extent().pages())?;
        Ok([rate, a_gib(cpu_s, region.size_bytes())])
    }
}
