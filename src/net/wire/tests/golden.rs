//! The bytes of every frame, written by hand from docs/protocol.md: a change of layout breaks these first.
//!
//! Role: fixed points for the tests, seeds for `fuzz/`. Neighbours: `super`. Invariants: every kind stands here, and every encoding.

use super::*;

pub(super) struct Golden {
    pub(super) name: &'static str,
    pub(super) frame: Frame,
    pub(super) bytes: Vec<u8>,
}

fn golden(name: &'static str, frame: Frame, lines: &[&[u8]]) -> Golden {
    Golden { name, frame, bytes: lines.concat() }
}

pub(super) fn run_extent_of(first: u64, count: u64) -> RunExtent {
    RunExtent::new(Extent::new(first, count).unwrap()).unwrap()
}

fn run(first: u64, count: u64, encoding: Encoding, bytes: &'static [u8]) -> EncodedRun {
    EncodedRun::new(*run_extent_of(first, count), encoding, Bytes::from_static(bytes)).unwrap()
}

fn text<const MIN: u32, const MAX: u32>(text: &str) -> Limited<Box<str>, MIN, MAX> {
    Limited::new(text).unwrap()
}

/// A session with a different number in every byte.
const SESSION: u128 = 0x0f0e_0d0c_0b0a_0908_0706_0504_0302_0100;
const SESSION_BYTES: &[u8] = &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
const EPOCH: u64 = 0x1716_1514_1312_1110;
const EPOCH_BYTES: &[u8] = &[0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17];

/// One LZ4 block of 4096 bytes 0x55: a literal, then one long match with itself, then the last literals.
const LZ4_PAGE: &[u8] = &[
    0x1f, 0x55, // token: 1 literal, match of 15 and more; the literal
    0x01, 0x00, // from 1 byte back
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, // 15 * 255
    0xf6, // and 246: a match of 4 + 15 + 3825 + 246 = 4090
    0x50, 0x55, 0x55, 0x55, 0x55, 0x55, // token: 5 literals, the end; 1 + 4090 + 5 = 4096
];

/// Every kind in the order of its number.
#[rustfmt::skip]
pub(super) fn goldens() -> Vec<Golden> {
    vec![
        golden("hello", Frame::Hello { version: 1, agent: text("ferry/1") }, &[
            &[0x01, 0, 0, 0, 10, 0, 0, 0], // HELLO, no flags, reserved, 10 bytes follow
            &[1, 0],                       // version 1
            &[7], b"ferry/1",              // agent: 7 bytes
        ]),
        golden("welcome", Frame::Welcome { version: 0x0201, agent: text("") }, &[
            &[0x02, 0, 0, 0, 3, 0, 0, 0], // WELCOME, 3 bytes follow
            &[0x01, 0x02],                // version, low byte first
            &[0],                         // agent: none
        ]),
        golden("open", Frame::Open { name: text("wörld") }, &[
            &[0x03, 0, 0, 0, 7, 0, 0, 0],   // OPEN, 7 bytes follow
            &[6], b"w", &[0xc3, 0xb6], b"rld", // name: 6 bytes of UTF-8
        ]),
        golden("opened", Frame::Opened { region: 7, access: Access::ReadWrite, page_size: PageSize::KIB_4, size_bytes: 1 << 30 }, &[
            &[0x04, 0, 0, 0, 16, 0, 0, 0], // OPENED, 16 bytes follow
            &[7, 0, 0, 0],                 // region 7
            &[1],                          // access: read-write
            &[12],                         // pages of 2^12 bytes
            &[0, 0],                       // reserved
            &[0, 0, 0, 0x40, 0, 0, 0, 0],  // size: 1 GiB
        ]),
        golden("failed", Frame::Failed { code: ErrorCode::OutOfRange, message: text("past the end") }, &[
            &[0x05, 0, 0, 0, 16, 0, 0, 0], // FAILED, 16 bytes follow
            &[4, 0],                       // code 4: out of range
            &[12, 0], b"past the end",     // message: 12 bytes
        ]),
        golden("failed_unknown_code", Frame::Failed { code: ErrorCode::Other(0xbeef), message: text("") }, &[
            &[0x05, 0, 0, 0, 4, 0, 0, 0], // FAILED, 4 bytes follow
            &[0xef, 0xbe],                // a code of a later version
            &[0, 0],                      // message: none
        ]),
        golden("lane", Frame::Lane { class: Class::Demand }, &[
            &[0x06, 0, 0, 0, 1, 0, 0, 0], // LANE, 1 byte follows
            &[2],                         // class: demand
        ]),
        golden("read", Frame::Read { region: 7, extent: run_extent_of(0x0102_0304_0506_0708, 16) }, &[
            &[0x10, 0, 0, 0, 16, 0, 0, 0], // READ, 16 bytes follow
            &[7, 0, 0, 0],                 // region 7
            &[16, 0, 0, 0],                // 16 pages
            &[8, 7, 6, 5, 4, 3, 2, 1],     // from this page
        ]),
        golden("data_zero", Frame::Data { serve_us: 0, run: run(9, 256, Encoding::Zero, &[]) }, &[
            &[0x11, 0, 0, 0, 16, 0, 0, 0], // DATA, zero, 16 bytes follow
            &[0, 1, 0, 0],                 // 256 pages
            &[0, 0, 0, 0],                 // served in less than 1 us
            &[9, 0, 0, 0, 0, 0, 0, 0],     // from page 9
        ]),
        golden("data_raw", Frame::Data { serve_us: 300, run: run(4, 1, Encoding::Raw, &[0xaa; 512]) }, &[
            &[0x11, 1, 0, 0, 0x10, 2, 0, 0], // DATA, raw, 528 bytes follow
            &[1, 0, 0, 0],                   // 1 page
            &[0x2c, 1, 0, 0],                // served in 300 us
            &[4, 0, 0, 0, 0, 0, 0, 0],       // from page 4
            &[0xaa; 512],                    // a page of 512 bytes
        ]),
        golden("data_lz4", Frame::Data { serve_us: 5, run: run(4, 1, Encoding::Lz4, LZ4_PAGE) }, &[
            &[0x11, 2, 0, 0, 42, 0, 0, 0], // DATA, lz4, 42 bytes follow
            &[1, 0, 0, 0],                 // 1 page
            &[5, 0, 0, 0],                 // served in 5 us
            &[4, 0, 0, 0, 0, 0, 0, 0],     // from page 4
            LZ4_PAGE,                      // a page of 4096 bytes
        ]),
        golden("write_zero", Frame::Write { region: 2, run: run(0, 3, Encoding::Zero, &[]) }, &[
            &[0x12, 0, 0, 0, 16, 0, 0, 0], // WRITE, zero, 16 bytes follow
            &[2, 0, 0, 0],                 // region 2
            &[3, 0, 0, 0],                 // 3 pages
            &[0, 0, 0, 0, 0, 0, 0, 0],     // from page 0
        ]),
        golden("write_lz4", Frame::Write { region: 2, run: run(1, 1, Encoding::Lz4, LZ4_PAGE) }, &[
            &[0x12, 2, 0, 0, 42, 0, 0, 0], // WRITE, lz4, 42 bytes follow
            &[2, 0, 0, 0],                 // region 2
            &[1, 0, 0, 0],                 // 1 page
            &[1, 0, 0, 0, 0, 0, 0, 0],     // from page 1
            LZ4_PAGE,                      // a page of 4096 bytes
        ]),
        golden("flush", Frame::Flush { region: 2 }, &[
            &[0x13, 0, 0, 0, 4, 0, 0, 0], // FLUSH, 4 bytes follow
            &[2, 0, 0, 0],                // region 2
        ]),
        golden("done", Frame::Done, &[
            &[0x14, 0, 0, 0, 0, 0, 0, 0], // DONE, nothing follows
        ]),
        golden("pull", Frame::Pull {
            region: 7,
            credit_bytes: 4 << 20,
            extents: PullExtents::new(vec![Extent::page(5), Extent::new(0x100, 0x200).unwrap()]).unwrap(),
        }, &[
            &[0x20, 0, 0, 0, 48, 0, 0, 0],  // PULL, 48 bytes follow
            &[7, 0, 0, 0],                  // region 7
            &[2, 0, 0, 0],                  // 2 extents
            &[0, 0, 0x40, 0, 0, 0, 0, 0],   // credit: 4 MiB
            &[5, 0, 0, 0, 0, 0, 0, 0],      // the first starts at page 5
            &[1, 0, 0, 0, 0, 0, 0, 0],      // and has 1 page
            &[0, 1, 0, 0, 0, 0, 0, 0],      // the second starts at page 256
            &[0, 2, 0, 0, 0, 0, 0, 0],      // and has 512
        ]),
        golden("credit", Frame::Credit { total_bytes: 8 << 20 }, &[
            &[0x21, 0, 0, 0, 8, 0, 0, 0], // CREDIT, 8 bytes follow
            &[0, 0, 0x80, 0, 0, 0, 0, 0], // 8 MiB since the PULL
        ]),
        golden("end", Frame::End, &[
            &[0x22, 0, 0, 0, 0, 0, 0, 0], // END, nothing follows
        ]),
        golden("take", Frame::Take {
            session: SESSION,
            plan: Plan {
                kind: MoveKind::Hybrid,
                at_limit: AtLimit::Force,
                round_limit: 0x0302,
                downtime_limit_us: 300_000,
                time_limit_ms: 0x0102_0304_0506,
                behind_bytes: 0x0708,
            },
        }, &[
            &[0x30, 0, 0, 0, 40, 0, 0, 0], // TAKE, 40 bytes follow
            SESSION_BYTES,                 // session, low byte first
            &[2, 1],                       // strategy hybrid, at_limit force
            &[2, 3],                       // round_limit
            &[0xe0, 0x93, 0x04, 0x00],     // downtime_limit_us 300000
            &[6, 5, 4, 3, 2, 1, 0, 0],     // time_limit_ms
            &[8, 7, 0, 0, 0, 0, 0, 0],     // behind_bytes
        ]),
        golden("offer", Frame::Offer {
            session: SESSION,
            epoch: EPOCH,
            state_bytes: StateLength::new(70_000u64).unwrap(),
            regions: OfferedRegions::new(vec![
                OfferedRegion { name: text("ram"), page_size: PageSize::new(2 << 20).unwrap(), size_bytes: 4 << 20, address: 0 },
                OfferedRegion { name: text("vram"), page_size: PageSize::KIB_4, size_bytes: 4096, address: 0x7f00_0000_0000 },
            ]).unwrap(),
        }, &[
            &[0x31, 0, 0, 0, 77, 0, 0, 0],      // OFFER, 77 bytes follow
            SESSION_BYTES,                      // session
            EPOCH_BYTES,                        // epoch
            &[0x70, 0x11, 1, 0, 0, 0, 0, 0],    // 70000 bytes of state
            &[2, 0],                            // 2 regions
            &[3], b"ram",                       // the first: its name
            &[21],                              // pages of 2^21 bytes
            &[0, 0, 0x40, 0, 0, 0, 0, 0],       // size: 4 MiB
            &[0, 0, 0, 0, 0, 0, 0, 0],          // at any address
            &[4], b"vram",                      // the second: its name
            &[12],                              // pages of 2^12 bytes
            &[0, 0x10, 0, 0, 0, 0, 0, 0],       // size: 4 KiB
            &[0, 0, 0, 0, 0, 0x7f, 0, 0],       // at this address
        ]),
        golden("state", Frame::State { bytes: StatePiece::new(&b"registers"[..]).unwrap() }, &[
            &[0x32, 0, 0, 0, 9, 0, 0, 0], // STATE, 9 bytes follow
            b"registers",                 // the program's bytes
        ]),
        golden("ready", Frame::Ready { session: SESSION, epoch: EPOCH }, &[
            &[0x33, 0, 0, 0, 24, 0, 0, 0], // READY, 24 bytes follow
            SESSION_BYTES,                 // session
            EPOCH_BYTES,                   // epoch
        ]),
        golden("commit", Frame::Commit { session: SESSION, epoch: EPOCH }, &[
            &[0x34, 0, 0, 0, 24, 0, 0, 0], // COMMIT, 24 bytes follow
            SESSION_BYTES,                 // session
            EPOCH_BYTES,                   // epoch
        ]),
        golden("resumed", Frame::Resumed { session: SESSION, epoch: EPOCH }, &[
            &[0x35, 0, 0, 0, 24, 0, 0, 0], // RESUMED, 24 bytes follow
            SESSION_BYTES,                 // session
            EPOCH_BYTES,                   // epoch
        ]),
        golden("complete", Frame::Complete { session: SESSION, epoch: EPOCH }, &[
            &[0x36, 0, 0, 0, 24, 0, 0, 0], // COMPLETE, 24 bytes follow
            SESSION_BYTES,                 // session
            EPOCH_BYTES,                   // epoch
        ]),
        golden("released", Frame::Released { session: SESSION, epoch: EPOCH }, &[
            &[0x37, 0, 0, 0, 24, 0, 0, 0], // RELEASED, 24 bytes follow
            SESSION_BYTES,                 // session
            EPOCH_BYTES,                   // epoch
        ]),
        golden("abort", Frame::Abort { session: SESSION, epoch: EPOCH, code: ErrorCode::Aborted, message: text("no room") }, &[
            &[0x38, 0, 0, 0, 35, 0, 0, 0], // ABORT, 35 bytes follow
            SESSION_BYTES,                 // session
            EPOCH_BYTES,                   // epoch
            &[9, 0],                       // code 9: aborted
            &[7, 0], b"no room",           // message: 7 bytes
        ]),
        golden("mapped", Frame::Mapped { session: SESSION, epoch: EPOCH, since: 3 }, &[
            &[0x39, 0, 0, 0, 32, 0, 0, 0], // MAPPED, 32 bytes follow
            SESSION_BYTES,                 // session
            EPOCH_BYTES,                   // epoch
            &[3, 0, 0, 0, 0, 0, 0, 0],     // since 3
        ]),
        golden("prepare", Frame::Prepare { session: SESSION, epoch: EPOCH, state_bytes: StateLength::new(9u64).unwrap() }, &[
            &[0x3a, 0, 0, 0, 32, 0, 0, 0], // PREPARE, 32 bytes follow
            SESSION_BYTES,                 // session
            EPOCH_BYTES,                   // epoch
            &[9, 0, 0, 0, 0, 0, 0, 0],     // state_bytes 9
        ]),
        golden("feed", Frame::Feed { session: SESSION, epoch: EPOCH, region: 3, credit_bytes: 1 << 24 }, &[
            &[0x3b, 0, 0, 0, 36, 0, 0, 0], // FEED, 36 bytes follow
            SESSION_BYTES,                 // session
            EPOCH_BYTES,                   // epoch
            &[3, 0, 0, 0],                 // region 3
            &[0, 0, 0, 1, 0, 0, 0, 0],     // credit_bytes 16 MiB
        ]),
        golden("lacks", Frame::Lacks { more: true, extents: PullExtents::new(vec![Extent::new(7, 2).unwrap()]).unwrap() }, &[
            &[0x3c, 0, 0, 0, 21, 0, 0, 0], // LACKS, 21 bytes follow
            &[1, 0, 0, 0],                 // extents: one
            &[1],                          // more follow
            &[7, 0, 0, 0, 0, 0, 0, 0],     // first 7
            &[2, 0, 0, 0, 0, 0, 0, 0],     // count 2
        ]),
        golden("progress", Frame::Progress {
            session: SESSION,
            epoch: EPOCH,
            copying: Copying { round: 2, owed_bytes: 4096, dirty_bytes_s: 256, bandwidth_bytes_s: 65_536, predicted_us: 3 },
        }, &[
            &[0x3d, 0, 0, 0, 60, 0, 0, 0], // PROGRESS, 60 bytes follow
            SESSION_BYTES,                 // session
            EPOCH_BYTES,                   // epoch
            &[2, 0, 0, 0],                 // round 2
            &[0, 16, 0, 0, 0, 0, 0, 0],    // owed_bytes 4096
            &[0, 1, 0, 0, 0, 0, 0, 0],     // dirty_bytes_s 256
            &[0, 0, 1, 0, 0, 0, 0, 0],     // bandwidth_bytes_s 65536
            &[3, 0, 0, 0, 0, 0, 0, 0],     // predicted_us 3
        ]),
        golden("point", Frame::Point {
            session: SESSION,
            epoch: EPOCH,
            number: 5,
            age_us: 1000,
            state_bytes: StateLength::new(9u64).unwrap(),
        }, &[
            &[0x3e, 0, 0, 0, 48, 0, 0, 0],    // POINT, 48 bytes follow
            SESSION_BYTES,                    // session
            EPOCH_BYTES,                      // epoch
            &[5, 0, 0, 0, 0, 0, 0, 0],        // number 5
            &[0xe8, 0x03, 0, 0, 0, 0, 0, 0],  // age_us 1000
            &[9, 0, 0, 0, 0, 0, 0, 0],        // state_bytes 9
        ]),
        golden("mark", Frame::Mark { number: 5 }, &[
            &[0x3f, 0, 0, 0, 8, 0, 0, 0], // MARK, 8 bytes follow
            &[5, 0, 0, 0, 0, 0, 0, 0],    // number 5
        ]),
        golden("kept", Frame::Kept { session: SESSION, epoch: EPOCH, number: 5 }, &[
            &[0x40, 0, 0, 0, 32, 0, 0, 0], // KEPT, 32 bytes follow
            SESSION_BYTES,                 // session
            EPOCH_BYTES,                   // epoch
            &[5, 0, 0, 0, 0, 0, 0, 0],     // number 5
        ]),
        golden("promote", Frame::Promote { session: SESSION, epoch: EPOCH }, &[
            &[0x41, 0, 0, 0, 24, 0, 0, 0], // PROMOTE, 24 bytes follow
            SESSION_BYTES,                 // session
            EPOCH_BYTES,                   // epoch
        ]),
        golden("depose", Frame::Depose { session: SESSION, epoch: EPOCH }, &[
            &[0x42, 0, 0, 0, 24, 0, 0, 0], // DEPOSE, 24 bytes follow
            SESSION_BYTES,                 // session
            EPOCH_BYTES,                   // epoch
        ]),
        golden("deposed", Frame::Deposed { session: SESSION, epoch: EPOCH }, &[
            &[0x43, 0, 0, 0, 24, 0, 0, 0], // DEPOSED, 24 bytes follow
            SESSION_BYTES,                 // session
            EPOCH_BYTES,                   // epoch
        ]),
    ]
}
