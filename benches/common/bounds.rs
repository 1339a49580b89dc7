//! What the processors allow: the CPU seconds that the parts of a pull take, measured by themselves in the same run.
//!
//! Role: tells a target that pageferry misses from one that nobody could meet on the machine. Neighbours: bench `throughput` measures the parts. Invariants:
//! a pure function of medians; silent about a pull of which a part was not measured. Where there are more processors than threads that work, a bound is
//! true and says little.

use super::{
    pages::{TEXT_PERCENT, ZERO_PERCENT},
    results::figure,
};

/// The rate that a pull cannot exceed.
pub struct Bound {
    pub key: &'static str,
    pub mb_s: f64,
    /// What it is made of, for people.
    pub note: String,
}

/// All that the medians of a run allow to be said.
pub fn bounds(cpus: usize, median: &impl Fn(&str) -> Option<f64>) -> Vec<Bound> {
    [pull_jumbo(cpus, median), pull_vmlike(cpus, median)].into_iter().flatten().collect()
}

fn pull_jumbo(cpus: usize, median: &impl Fn(&str) -> Option<f64>) -> Option<Bound> {
    let (quinn_s, copy_s) = (median("quinn_jumbo_cpu_s_gib")?, median("copy_cpu_s_gib")?);
    let quinn = median("quinn_jumbo_mb_s")?;
    let mb_s = all_full_mb_s(cpus, quinn_s + copy_s);
    let of_quinn = |key: &str| Some(format!("{:.2}", median(key)? / quinn));
    let note = format!(
        "Bound of pull_jumbo: quinn_jumbo {quinn_s:.2} + copy {copy_s:.2} = {:.2} CPU s/GiB; with {cpus} CPUs full {} MB/s = {:.2} of quinn_jumbo. Plain quinn \
         with bare installs reached {} of quinn_jumbo, pull_jumbo {}.",
        quinn_s + copy_s,
        figure(mb_s),
        mb_s / quinn,
        of_quinn("quinn_jumbo_install_mb_s")?,
        of_quinn("pull_jumbo_mb_s")?,
    );
    Some(Bound { key: "bound_pull_jumbo_mb_s", mb_s, note })
}

fn pull_vmlike(cpus: usize, median: &impl Fn(&str) -> Option<f64>) -> Option<Bound> {
    let (quinn_s, copy_s, zero_s) = (median("quinn_cpu_s_gib")?, median("copy_cpu_s_gib")?, median("zero_cpu_s_gib")?);
    let (lz4_s, lz4_ratio, pull) = (median("lz4_text_cpu_s_gib")?, median("lz4_text_ratio")?, median("pull_mb_s")?);
    let [zero, text] = [ZERO_PERCENT, TEXT_PERCENT].map(|percent| percent as f64 / 100.0);
    let noise = 1.0 - zero - text;
    let (plain_s, free_s) = (quinn_s + copy_s, quinn_s / lz4_ratio + copy_s);
    let cpu_s = |text_s: f64| noise * plain_s + text * text_s + zero * zero_s;
    let text_s = plain_s.min(free_s + lz4_s);
    let mb_s = all_full_mb_s(cpus, cpu_s(text_s));
    let of_pull = |cpu_s: f64| all_full_mb_s(cpus, cpu_s) / pull;
    let note = format!(
        "Bound of pull_vmlike: {noise:.1} (quinn {quinn_s:.2} + copy {copy_s:.2}) + {text:.1} min(quinn + copy = {plain_s:.2}, quinn / {lz4_ratio:.2} + lz4 {lz4_s:.2} + \
         copy = {:.2}) + {zero:.1} zero {zero_s:.2} = {:.2} CPU s/GiB; with {cpus} CPUs full {} MB/s = {:.2} of pull. Were compression free: {:.2} CPU s/GiB, {:.2} of pull.",
        free_s + lz4_s,
        cpu_s(text_s),
        figure(mb_s),
        of_pull(cpu_s(text_s)),
        cpu_s(free_s),
        of_pull(cpu_s(free_s)),
    );
    Some(Bound { key: "bound_pull_vmlike_mb_s", mb_s, note })
}

/// The rate at which every processor is busy.
fn all_full_mb_s(cpus: usize, cpu_s_gib: f64) -> f64 {
    cpus as f64 / cpu_s_gib * f64::from(1 << 30) / 1e6
}
