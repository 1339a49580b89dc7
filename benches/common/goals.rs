//! What each key means, what it is compared with, and how good it shall be.
//!
//! Role: the one table of units, baselines, targets and plots. Neighbours: `results` judges a run by it, the bench `report` draws it.
//! Invariants: a target is a ratio of two medians of the same run, never an absolute figure; benches/README.md says the same in words.

/// A target: `key` at most or at least so many times its baseline.
pub struct Goal {
    pub key: &'static str,
    pub baseline: Baseline,
    pub bound: Bound,
    pub target: f64,
    /// What would be better still.
    pub stretch: Option<f64>,
}

/// What a key is divided by.
pub enum Baseline {
    /// The sum of these keys.
    Sum(&'static [&'static str]),
    /// Events a second, if each takes the microseconds of this key.
    RateOf(&'static str),
    /// Nothing: it is a ratio of two medians by itself.
    One,
}

/// On which side of a factor the ratio of a figure and its baseline shall lie.
#[derive(Clone, Copy)]
pub enum Bound {
    AtMost,
    AtLeast,
}

impl Baseline {
    /// The keys it needs.
    pub fn keys(&self) -> &[&'static str] {
        match self {
            Baseline::Sum(keys) => keys,
            Baseline::RateOf(key) => std::slice::from_ref(key),
            Baseline::One => &[],
        }
    }

    /// Its value, if all its keys have one.
    pub fn value(&self, figure: impl Fn(&str) -> Option<f64>) -> Option<f64> {
        match self {
            Baseline::Sum(keys) => keys.iter().map(|key| figure(key)).sum(),
            Baseline::RateOf(key) => figure(key).map(|us| 1e6 / us),
            Baseline::One => Some(1.0),
        }
    }

    pub fn text(&self) -> String {
        match self {
            Baseline::Sum(keys) => keys.join(" + "),
            Baseline::RateOf(key) => format!("1e6 / {key}"),
            Baseline::One => String::new(),
        }
    }
}

impl Bound {
    pub fn holds(self, ratio: f64, factor: f64) -> bool {
        match self {
            Bound::AtMost => ratio <= factor,
            Bound::AtLeast => ratio >= factor,
        }
    }

    pub fn sign(self) -> &'static str {
        match self {
            Bound::AtMost => "<=",
            Bound::AtLeast => ">=",
        }
    }
}

const fn at_most(key: &'static str, target: f64, baseline: Baseline, stretch: Option<f64>) -> Goal {
    Goal { key, baseline, bound: Bound::AtMost, target, stretch }
}

const fn at_least(key: &'static str, target: f64, baseline: Baseline, stretch: Option<f64>) -> Goal {
    Goal { key, baseline, bound: Bound::AtLeast, target, stretch }
}

/// What pageferry adds to the same calls by a program of its own: at most a fifth.
macro_rules! twin {
    ($key:literal) => {
        at_most($key, 1.2, Baseline::Sum(&[concat!("raw_", $key)]), None)
    };
}

pub static GOALS: &[Goal] = &[
    at_most("store_us_p50", 1.25, Baseline::Sum(&["raw_us_p50"]), Some(1.05)),
    at_most("quic_us_p50", 1.8, Baseline::Sum(&["raw_us_p50", "udp_us_p50"]), Some(1.3)),
    at_most("quic_us_p99", 2.5, Baseline::Sum(&["raw_us_p99", "udp_us_p99"]), Some(1.5)),
    at_least("quic8_pages_s", 3.0, Baseline::RateOf("quic_us_p50"), Some(5.0)),
    // The same of ends that do not poll, so that one fault by itself does not keep the processors busy that eight would share.
    at_least("quic8_sleeping_pages_s", 3.0, Baseline::RateOf("quic_sleeping_us_p50"), Some(5.0)),
    at_most("post_downtime_ms", 1.0, Baseline::Sum(&["bound_post_downtime_ms"]), None),
    at_most("hybrid_downtime_ms", 1.0, Baseline::Sum(&["bound_hybrid_downtime_ms"]), None),
    at_most("post_total_s", 1.3, Baseline::Sum(&["bound_total_s"]), None),
    at_most("pre_total_s", 1.3, Baseline::Sum(&["bound_total_s"]), None),
    at_most("hybrid_total_s", 1.3, Baseline::Sum(&["bound_total_s"]), None),
    at_least("store_seq_mb_s", 0.8, Baseline::Sum(&["copy_mb_s"]), Some(0.95)),
    at_least("pull_mb_s", 0.95, Baseline::Sum(&["quinn_mb_s"]), None),
    at_least("pull_jumbo_mb_s", 0.95, Baseline::Sum(&["quinn_jumbo_mb_s"]), None),
    at_least("pull_vmlike_mb_s", 2.0, Baseline::Sum(&["pull_mb_s"]), None),
    // Between two baselines: the transport options that pageferry sets shall not be worse than quinn's own.
    at_least("quinn_mb_s", 1.0, Baseline::Sum(&["quinn_stock_mb_s"]), Some(2.0)),
    at_least("managed_mb_s_rtt25", 0.9, Baseline::Sum(&["managed_mb_s_rtt0"]), None),
    at_least("demand_seq_mb_s_rtt25", 0.7, Baseline::Sum(&["demand_seq_mb_s_rtt0"]), None),
    at_least("ahead_gain_rtt25", 5.0, Baseline::One, None),
    at_least("random_ahead_ratio_rtt25", 0.95, Baseline::One, None),
    at_least("write_mb_s_rtt25", 0.8, Baseline::Sum(&["write_mb_s_rtt0"]), None),
    at_most("first_page_ms_rtt0", 1.0, Baseline::Sum(&["bound_first_page_ms_rtt0"]), None),
    at_most("first_page_ms_rtt1", 1.0, Baseline::Sum(&["bound_first_page_ms_rtt1"]), None),
    at_most("first_page_ms_rtt5", 1.0, Baseline::Sum(&["bound_first_page_ms_rtt5"]), None),
    at_most("first_page_ms_rtt10", 1.0, Baseline::Sum(&["bound_first_page_ms_rtt10"]), None),
    at_most("first_page_ms_rtt25", 1.0, Baseline::Sum(&["bound_first_page_ms_rtt25"]), None),
    at_most("first_page_ms_rtt50", 1.0, Baseline::Sum(&["bound_first_page_ms_rtt50"]), None),
    at_least("warm_gain_rtt10", 3.0, Baseline::One, None),
    at_most("budget_random_resident_ratio", 1.05, Baseline::One, None),
    at_most("budget_skewed_resident_ratio", 1.05, Baseline::One, None),
    twin!("wp_async_arm_ms"),
    twin!("wp_async_first_write_us"),
    twin!("wp_async_take_ms"),
    twin!("wp_async_first_write_us_1pct"),
    twin!("wp_async_take_ms_1pct"),
    twin!("wp_async_first_write_us_50pct"),
    twin!("wp_async_take_ms_50pct"),
    twin!("wp_sync_arm_ms"),
    twin!("wp_sync_first_write_us"),
    twin!("wp_sync_take_ms"),
    twin!("wp_sync_first_write_us_1pct"),
    twin!("wp_sync_take_ms_1pct"),
    twin!("wp_sync_first_write_us_50pct"),
    twin!("wp_sync_take_ms_50pct"),
    twin!("frozen_arm_ms"),
    twin!("frozen_first_write_us"),
    twin!("soft_dirty_arm_ms"),
    twin!("soft_dirty_first_write_us"),
    twin!("soft_dirty_take_ms"),
    twin!("soft_dirty_first_write_us_1pct"),
    twin!("soft_dirty_take_ms_1pct"),
    twin!("soft_dirty_first_write_us_50pct"),
    twin!("soft_dirty_take_ms_50pct"),
];

/// How the keys of baselines begin: what others are measured against, never what pageferry does.
pub const BASELINES: [&str; 8] = ["raw_", "udp_", "copy_", "zero_", "lz4_", "quinn_", "bound_", PEER];
/// How the keys of another program begin that does the same, before the key that is its twin: a comparison, without a target.
pub const PEER: &str = "qemu_";

pub fn goal_of(key: &str) -> Option<&'static Goal> {
    GOALS.iter().find(|goal| goal.key == key)
}

/// The unit of a key, from its name.
pub fn unit_of(key: &str) -> &'static str {
    match key {
        _ if key.contains("_us_") || key.ends_with("_us") => "us",
        _ if key.contains("_ms_") || key.ends_with("_ms") => "ms",
        _ if key.ends_with("_pages_s") => "pages/s",
        _ if key.ends_with("_mb_s") || key.contains("_mb_s_rtt") => "MB/s",
        _ if key.contains("_mb_rtt") => "MB",
        _ if key.ends_with("_cpu_s_gib") => "CPU s/GiB",
        _ if key.ends_with("_percent") => "%",
        _ if key.ends_with("_ratio") || key.contains("_ratio_") || key.contains("_gain_") => "times",
        _ if key.ends_with("_ms") => "ms",
        _ if key.ends_with("_total_s") => "s",
        _ if key.ends_with("_sent_mb") => "MB",
        _ if key.ends_with("_faults") => "faults",
        _ => "",
    }
}

/// Bars of keys with one unit. A bench that did not measure a key leaves its bar out.
pub struct Plot {
    pub file: &'static str,
    pub title: &'static str,
    pub keys: &'static [&'static str],
}

pub static PLOTS: &[Plot] = &[
    Plot {
        file: "fault_latency",
        title: "One page, from touch to return (us, 4 KiB, random order)",
        keys: &[
            "raw_us_p50",
            "udp_us_p50",
            "store_us_p50",
            "quic_us_p50",
            "raw_us_p99",
            "udp_us_p99",
            "store_us_p99",
            "quic_us_p99",
        ],
    },
    Plot {
        file: "fault_hops",
        title: "Where the time of a fault over QUIC goes (mean, us)",
        keys: &[
            "quic_hop_fault_wake_us_mean",
            "quic_hop_decide_us_mean",
            "quic_hop_request_us_mean",
            "quic_hop_wire_us_mean",
            "quic_hop_serve_us_mean",
            "quic_hop_reply_us_mean",
            "quic_hop_install_us_mean",
        ],
    },
    Plot {
        file: "throughput",
        title: "How fast a region fills (MB/s)",
        keys: &[
            "copy_mb_s",
            "store_seq_mb_s",
            "quinn_stock_mb_s",
            "quinn_mb_s",
            "quinn_install_mb_s",
            "pull_mb_s",
            "quinn_jumbo_mb_s",
            "quinn_jumbo_install_mb_s",
            "pull_jumbo_mb_s",
            "pull_vmlike_mb_s",
        ],
    },
    Plot {
        file: "rtt_managed",
        title: "Memory of a peer that is 0 to 50 ms away, pulled in the background and read (MB/s)",
        keys: &[
            "managed_mb_s_rtt0",
            "managed_mb_s_rtt1",
            "managed_mb_s_rtt5",
            "managed_mb_s_rtt10",
            "managed_mb_s_rtt25",
            "managed_mb_s_rtt50",
        ],
    },
    Plot {
        file: "rtt_write",
        title: "The same written back, until it is durable there (MB/s)",
        keys: &[
            "write_mb_s_rtt0",
            "write_mb_s_rtt1",
            "write_mb_s_rtt5",
            "write_mb_s_rtt10",
            "write_mb_s_rtt25",
            "write_mb_s_rtt50",
        ],
    },
    Plot {
        file: "rtt_demand",
        title: "The same on demand alone, in order (MB/s)",
        keys: &[
            "demand_seq_mb_s_rtt0",
            "demand_seq_mb_s_rtt1",
            "demand_seq_mb_s_rtt5",
            "demand_seq_mb_s_rtt10",
            "demand_seq_mb_s_rtt25",
            "demand_seq_mb_s_rtt50",
        ],
    },
    Plot {
        file: "rtt_first_page",
        title: "Opening a mount and touching its first page (ms)",
        keys: &[
            "first_page_ms_rtt0",
            "first_page_ms_rtt1",
            "first_page_ms_rtt5",
            "first_page_ms_rtt10",
            "first_page_ms_rtt25",
            "first_page_ms_rtt50",
        ],
    },
    Plot {
        file: "working_set",
        title: "A program has touched all that it begins with (ms since its mount was opened)",
        keys: &[
            "ondemand_ms_rtt1",
            "linear_ms_rtt1",
            "warm_ms_rtt1",
            "ondemand_ms_rtt10",
            "linear_ms_rtt10",
            "warm_ms_rtt10",
            "ondemand_ms_rtt25",
            "linear_ms_rtt25",
            "warm_ms_rtt25",
        ],
    },
    Plot {
        file: "budget",
        title: "Memory of a peer in a quarter of the memory that it takes (MB of accessed pages a second)",
        keys: &["budget_random_mb_s", "whole_random_mb_s", "budget_skewed_mb_s", "whole_skewed_mb_s"],
    },
    Plot {
        file: "migration_total",
        title: "A running program moves, from asking to having every page (s)",
        keys: &["bound_total_s", "qemu_post_total_s", "post_total_s", "hybrid_total_s", "qemu_pre_total_s", "pre_total_s"],
    },
    Plot {
        file: "migration_downtime",
        title: "How long the program stands still (ms)",
        keys: &["qemu_post_downtime_ms", "post_downtime_ms", "hybrid_downtime_ms", "qemu_pre_downtime_ms", "pre_downtime_ms"],
    },
    Plot {
        file: "dirty_first_write",
        title: "First write of a page whose writes are followed, or that is kept (p50, us)",
        keys: &[
            "raw_wp_async_first_write_us",
            "wp_async_first_write_us",
            "raw_wp_sync_first_write_us",
            "wp_sync_first_write_us",
            "raw_frozen_first_write_us",
            "frozen_first_write_us",
            "raw_soft_dirty_first_write_us",
            "soft_dirty_first_write_us",
        ],
    },
    Plot {
        file: "dirty_take",
        title: "Taking what was written of a region, 10 and 50 % of it (ms)",
        keys: &[
            "raw_wp_async_take_ms",
            "wp_async_take_ms",
            "raw_wp_async_take_ms_50pct",
            "wp_async_take_ms_50pct",
            "raw_wp_sync_take_ms",
            "wp_sync_take_ms",
            "raw_wp_sync_take_ms_50pct",
            "wp_sync_take_ms_50pct",
            "raw_soft_dirty_take_ms",
            "soft_dirty_take_ms",
            "raw_soft_dirty_take_ms_50pct",
            "soft_dirty_take_ms_50pct",
        ],
    },
];

/// Hops in the order of a page's journey, by the part of a key that names them, and what they hold. `store` sums up request to reply; what cannot be
/// told apart is measured together.
pub static HOPS: &[(&str, &str)] = &[
    ("fault", "fault: touch to message read"),
    ("decide", "decide: message read to request made"),
    ("request", "request: to its bytes handed to QUIC"),
    ("wire", "wire: both ways, without serve"),
    ("serve", "serve: at the peer"),
    ("reply", "reply: first byte to pages at hand"),
    ("store", "(request to reply: all in the store)"),
    ("install", "install"),
    ("rest", "(pager's bookkeeping around them)"),
    ("wake", "wake: install done to touch returned"),
    ("fault_wake", "fault + wake"),
    ("touch", "whole touch"),
];
