//! The program that a guest of QEMU runs: the twin of `writer`, without an operating system.
//!
//! Role: an image that QEMU boots by itself (Multiboot 1, section 3.1.1: a flat file that says where it goes), and what its memory must hold. Neighbours: `qemu` runs it and reads its
//! counts; `writer` is what it copies. Invariants: as `writer`: each operation writes one page of a hot set and then the count of operations, at the same rate, and one
//! that is late is made up for; between operations it halts, for a guest that waited busily would take a processor from the move.

use super::{
    PAGE_BYTES, Result,
    pages::Image,
    writer::{HOT_PAGES, PAGES_S},
};

/// Where the guest has the memory that is compared, as long as the region of the bench; its first page holds the counts.
pub const PAYLOAD: u64 = 16 << 20;
/// Memory beside that: the program's below it, and above it what the firmware keeps for itself at the end of memory (SeaBIOS 1.16: 16 MiB and what it frees again).
pub const BESIDE_BYTES: u64 = PAYLOAD + (24 << 20);
/// How many words of the first page are counts.
pub const COUNTS: usize = 4;

/// What the program says of itself.
#[derive(Clone, Copy)]
pub struct Counts {
    pub operations: u32,
    /// Cycles of its clock in 50 ms, measured beside the timer of the machine.
    cycles_50ms: u32,
    /// Cycles that all operations took together.
    cycles: u64,
}

impl Counts {
    /// `None` unless the program has begun: before that the words are what the machine was started with.
    pub fn read(words: [u32; COUNTS]) -> Option<Counts> {
        let [operations, cycles_50ms, low, high] = words;
        (operations > 0).then_some(Counts { operations, cycles_50ms, cycles: u64::from(high) << 32 | u64::from(low) })
    }

    /// How long the operations took that were done since `before`, in ms.
    pub fn took_ms_since(&self, before: &Counts) -> f64 {
        self.cycles.wrapping_sub(before.cycles) as f64 / f64::from(self.cycles_50ms) * 50.0
    }
}

const BASE: u32 = 1 << 20;
const CODE_AT: usize = 0x40;
const DESCRIPTORS_AT: usize = 0x680;
const SEGMENTS_AT: usize = 0x6a0;
const GATES_AT: usize = 0x700;
const IMAGE_BYTES: usize = 0x1000;

/// The vector that the timer's interrupt gets.
const TIMER: usize = 0x20;
/// How the program picks a page: Knuth's multiplicative hash, of which the upper bits are the best.
const FACTOR: u32 = 0x9e37_79b1;
const HASH_SHIFT: u32 = 18;
const _: () = assert!(HOT_PAGES == 1 << (32 - HASH_SHIFT));
/// As in the code below: cycles in 50 ms by this are the cycles from one operation to the next.
const OPERATIONS_50MS: u64 = 610;
const _: () = assert!(PAGES_S / 20 == OPERATIONS_50MS);
// The code below has these as numbers, low byte first.
const _: () = assert!(PAYLOAD == 0x0100_0000 && BASE == 0x0010_0000 && CODE_AT == 0x40);

/// 32-bit protected mode, no paging. Registers of the loop: esi operations, edi:ebx when the next one is due, ebp cycles from one to the next.
#[rustfmt::skip]
const CODE: &[u8] = &[
    0xfa,                                     // start: cli
    0xbc, 0x00, 0x00, 0x08, 0x00,             //   mov esp, 0x80000
    0x0f, 0x01, 0x15, 0x80, 0x06, 0x10, 0x00, //   lgdt [BASE + DESCRIPTORS_AT]
    0xea, 0x54, 0x00, 0x10, 0x00, 0x08, 0x00, //   jmp 0x8:flat
    0xb8, 0x10, 0x00, 0x00, 0x00,             // flat: mov eax, 0x10
    0x8e, 0xd8,                               //   mov ds, eax
    0x8e, 0xc0,                               //   mov es, eax
    0x8e, 0xd0,                               //   mov ss, eax
    0x0f, 0x01, 0x1d, 0x88, 0x06, 0x10, 0x00, //   lidt [BASE + DESCRIPTORS_AT + 8]
    0xfc,                                     //   cld
    // Interrupt controllers: vectors from TIMER on; ends of interrupts by themselves; the timer's interrupt alone.
    0xb0, 0x11, 0xe6, 0x20,                   //   mov al, 0x11; out 0x20, al
    0xb0, 0x20, 0xe6, 0x21,                   //   mov al, TIMER; out 0x21, al
    0xb0, 0x04, 0xe6, 0x21,                   //   mov al, 0x04; out 0x21, al
    0xb0, 0x03, 0xe6, 0x21,                   //   mov al, 0x03; out 0x21, al
    0xb0, 0xfe, 0xe6, 0x21,                   //   mov al, 0xfe; out 0x21, al
    0xb0, 0xff, 0xe6, 0xa1,                   //   mov al, 0xff; out 0xa1, al
    // Timer 0 interrupts a thousand times a second, as a kernel's may: 1193182 Hz / 1193.
    0xb0, 0x34, 0xe6, 0x43,                   //   mov al, 0x34; out 0x43, al
    0xb0, 0xa9, 0xe6, 0x40,                   //   mov al, 0xa9; out 0x40, al
    0xb0, 0x04, 0xe6, 0x40,                   //   mov al, 0x04; out 0x40, al
    // Timer 2 counts 50 ms once, 59659 / 1193182 Hz, and is watched: how fast does the clock of cycles go?
    0xe4, 0x61, 0x24, 0xfd,                   //   in al, 0x61; and al, 0xfd
    0x0c, 0x01, 0xe6, 0x61,                   //   or al, 0x01; out 0x61, al
    0xb0, 0xb0, 0xe6, 0x43,                   //   mov al, 0xb0; out 0x43, al
    0xb0, 0x0b, 0xe6, 0x42,                   //   mov al, 0x0b; out 0x42, al
    0xb0, 0xe9, 0xe6, 0x42,                   //   mov al, 0xe9; out 0x42, al
    0x0f, 0x31, 0x89, 0xc3,                   //   rdtsc; mov ebx, eax
    0xe4, 0x61, 0xa8, 0x20,                   // poll: in al, 0x61; test al, 0x20
    0x74, 0xfa,                               //   jz poll
    0x0f, 0x31, 0x29, 0xd8,                   //   rdtsc; sub eax, ebx
    0xa3, 0x04, 0x00, 0x00, 0x01,             //   mov [PAYLOAD + 4], eax
    0x31, 0xd2,                               //   xor edx, edx
    0xb9, 0x62, 0x02, 0x00, 0x00,             //   mov ecx, OPERATIONS_50MS
    0xf7, 0xf1, 0x89, 0xc5,                   //   div ecx; mov ebp, eax
    0x31, 0xf6,                               //   xor esi, esi
    0x0f, 0x31, 0x89, 0xc3, 0x89, 0xd7,       //   rdtsc; mov ebx, eax; mov edi, edx
    // An operation, if one is due. What it touches first may have yet to come: that is a part of how long it took.
    0x0f, 0x31, 0x89, 0xc1,                   // again: rdtsc; mov ecx, eax
    0x29, 0xd8, 0x19, 0xfa,                   //   sub eax, ebx; sbb edx, edi
    0x78, 0x3a,                               //   js ahead
    0x01, 0xeb, 0x83, 0xd7, 0x00,             //   add ebx, ebp; adc edi, 0
    0x46,                                     //   inc esi
    0x69, 0xc6, 0xb1, 0x79, 0x37, 0x9e,       //   imul eax, esi, FACTOR
    0xc1, 0xe8, 0x12, 0xc1, 0xe0, 0x0c,       //   shr eax, HASH_SHIFT; shl eax, 12
    0x89, 0xf2,                               //   mov edx, esi
    0x81, 0xe2, 0xff, 0x03, 0x00, 0x00,       //   and edx, 1023
    0x89, 0xb4, 0x90, 0x00, 0x10, 0x00, 0x01, //   mov [PAYLOAD + 4096 + eax + edx * 4], esi
    0x89, 0x35, 0x00, 0x00, 0x00, 0x01,       //   mov [PAYLOAD], esi
    0x0f, 0x31, 0x29, 0xc8,                   //   rdtsc; sub eax, ecx
    0x01, 0x05, 0x08, 0x00, 0x00, 0x01,       //   add [PAYLOAD + 8], eax
    0x83, 0x15, 0x0c, 0x00, 0x00, 0x01, 0x00, //   adc [PAYLOAD + 12], 0
    0xeb, 0xbc,                               //   jmp again
    0xfb, 0xf4,                               // ahead: sti; hlt
];

/// Where the timer's interrupt goes, behind the above. It does not return: nothing is to be gone on with.
#[rustfmt::skip]
const TICK: &[u8] = &[
    0xbc, 0x00, 0x00, 0x08, 0x00,             // tick: mov esp, 0x80000
    0xeb, 0xb3,                               //   jmp again
];

/// The file to boot.
pub fn boot_image() -> Vec<u8> {
    const MAGIC: u32 = 0x1bad_b002;
    /// The header says itself where the file is loaded.
    const FLAGS: u32 = 1 << 16;
    let mut image = vec![0; IMAGE_BYTES];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    let checksum = MAGIC.wrapping_add(FLAGS).wrapping_neg();
    // The header, where it and the file are loaded, the ends that are left to the file's length, and where to begin.
    let header = [MAGIC, FLAGS, checksum, BASE, BASE, 0, 0, BASE + CODE_AT as u32];
    put(0, &header.map(u32::to_le_bytes).concat());
    put(CODE_AT, &[CODE, TICK].concat());
    let descriptor = |last: u16, at: usize| [&last.to_le_bytes()[..], &(BASE + at as u32).to_le_bytes()].concat();
    put(DESCRIPTORS_AT, &descriptor(3 * 8 - 1, SEGMENTS_AT));
    put(DESCRIPTORS_AT + 8, &descriptor((TIMER as u16 + 1) * 8 - 1, GATES_AT));
    // None, code and data, both of 4 GiB from 0 (Intel SDM, volume 3, 3.4.5).
    put(SEGMENTS_AT, &[0u64, 0x00cf_9a00_0000_ffff, 0x00cf_9200_0000_ffff].map(u64::to_le_bytes).concat());
    // An interrupt gate (volume 3, 6.11): interrupts stay off until the next halt.
    let tick = u64::from(BASE) + (CODE_AT + CODE.len()) as u64;
    let gate = tick & 0xffff | 0x8 << 16 | 0x8e00 << 32 | tick >> 16 << 48;
    put(GATES_AT + TIMER * 8, &gate.to_le_bytes());
    image
}

/// Fails unless the guest's memory is `image` with the operations 1 to `operations` over it; `read` gives the bytes of one page after the other.
pub fn check(image: &Image, operations: u32, mut read: impl FnMut(u64, &mut [u8]) -> Result<()>) -> Result<()> {
    let mut wrote: Vec<Vec<u32>> = vec![Vec::new(); HOT_PAGES as usize];
    let hot_page = |n: u32| (n.wrapping_mul(FACTOR) >> HASH_SHIFT) as usize;
    (1..=operations).for_each(|n| wrote[hot_page(n)].push(n));
    let next = operations + 1;
    let (mut wanted, mut got) = (vec![0; PAGE_BYTES as usize], vec![0; PAGE_BYTES as usize]);
    for page in 0..image.pages() {
        read(page, &mut got)?;
        if page == 0 {
            let count = u32::from_le_bytes([got[0], got[1], got[2], got[3]]);
            if count != operations || got[COUNTS * 4..].iter().any(|byte| *byte != 0) {
                return Err(format!("the guest's first page is not that of {operations} operations: it counts {count}").into());
            }
            continue;
        }
        image.fill(page, &mut wanted);
        for n in wrote.get(page as usize - 1).into_iter().flatten() {
            let at = (n % 1024 * 4) as usize;
            wanted[at..at + 4].copy_from_slice(&n.to_le_bytes());
        }
        // The guest may have been stopped between the two writes of an operation.
        let at = (next % 1024 * 4) as usize;
        if page as usize == 1 + hot_page(next) && got[at..at + 4] == next.to_le_bytes() {
            wanted[at..at + 4].copy_from_slice(&next.to_le_bytes());
        }
        if wanted != got {
            return Err(format!("page {page} of the guest is not what {operations} operations leave").into());
        }
    }
    Ok(())
}
