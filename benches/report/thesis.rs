//! What the thesis measured, as it says it.
//!
//! Role: the figures that stand beside ours. Neighbours: `page` prints and draws them. Invariants: quoted from its text, none read from a plot by eye; each is labelled as the thesis's, of its own machine
//! and method, wherever it is shown; no verdict is made of them.

use super::curves::{Curve, NameAt, Point};

/// What the figures are of.
pub const SOURCE: &str = "\"Efficient Synchronization of Linux Memory Regions over a Network\", a thesis of 2023, on a laptop (i7-1280P, 20 threads, Linux 6.3)";

/// Why they are a measure of its methods there, and not a target here.
pub const CAUTION: &str = "A round trip there is a sleep before each read of the store, with no link behind it whose bandwidth, losses and queues would count; what was read was neither delivered nor \
checked; and the methods moved different amounts, from one page to 4 GiB, so that its curves compare with each other no more than with these.";

/// A figure, and the key that is nearest to it here, if there is one.
pub struct Quote {
    pub what: &'static str,
    pub figure: &'static str,
    pub key: Option<&'static str>,
}

const fn quote(what: &'static str, figure: &'static str, key: Option<&'static str>) -> Quote {
    Quote { what, figure, key }
}

pub static QUOTES: &[Quote] = &[
    quote("a page from a file on disk, 0 ms", "4.0 us", None),
    quote("a page by userfaultfd, from another process, 0 ms", "58 us", Some("store_us_p50")),
    quote("a page of a direct mount, 0 ms", "115 us", Some("quic_us_p50")),
    quote("a page of a managed mount, 0 ms", "160 us", Some("quic_us_p50")),
    quote("reading memory that is there", "20 GB/s", None),
    quote("reading a direct mount in order, 0 ms", "2.8 GB/s", Some("demand_seq_mb_s_rtt0")),
    quote("reading a managed mount, 0 ms", "2.4 GB/s", Some("managed_mb_s_rtt0")),
    quote("reading by userfaultfd in order, 0 ms", "0.45 GB/s", Some("demand_seq_mb_s_rtt0")),
    quote("reading a direct mount, 6 ms", "below 10 MB/s", Some("demand_seq_mb_s_rtt5")),
    quote("reading by userfaultfd, 6 ms", "below 1 MB/s", Some("demand_random_mb_s_rtt5")),
    quote("reading a managed mount, 25 ms", "0.5 GB/s", Some("managed_mb_s_rtt25")),
    quote("writing to a managed mount, not to its peer", "0.23 GB/s", Some("write_mb_s_rtt0")),
    quote("writing to a direct mount, 4 ms", "below 1 MB/s", Some("write_mb_s_rtt5")),
];

/// Throughput over the round trip, in MB/s.
pub fn throughput() -> Vec<Curve> {
    let at = |rtt_ms, value| Point { rtt_ms, value, is_below: false };
    let below = |rtt_ms, value| Point { rtt_ms, value, is_below: true };
    let curve = |name: &str, name_at, points: &[Point]| Curve {
        name: format!("thesis: {name}"),
        class: "other",
        points: points.to_vec(),
        name_at,
    };
    vec![
        curve("managed", NameAt::Over(1), &[at(0.0, 2400.0), at(10.0, 1000.0), at(25.0, 500.0)]),
        curve("direct", NameAt::End, &[at(0.0, 2800.0), below(6.0, 10.0)]),
        curve("userfaultfd", NameAt::Over(1), &[at(0.0, 450.0), below(6.0, 1.0)]),
        curve("managed, written", NameAt::Under(1), &[at(0.0, 230.0), at(6.0, 230.0)]),
    ]
}
