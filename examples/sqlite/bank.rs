//! The program that moves: a bank in SQLite, whose clerk transfers money for as long as it runs.
//!
//! Role: schema, contents and transactions. Neighbours: `vfs` puts its file into a region; `host` runs it; `proof` examines it. Invariants: what transfer `n` does follows from
//! `n` alone, so anybody can say what the books must be after it; between two transfers everything that was committed is in the region, and nothing else of the program is
//! anywhere: a new connection goes on from the region alone.

use crate::{
    disk::{Disk, DiskError},
    vfs,
};
use pageferry::Region;
use rusqlite::{Connection, Statement};
use std::sync::Arc;
use thiserror::Error;

/// Of each account, when the bank opens.
pub const FIRST_BALANCE: i64 = 1_000_000;
/// Four accounts fill a page, with room for balances that grow.
pub const ACCOUNT_BYTES: u64 = 1024;
const PROFILE_BYTES: usize = 950;
/// The first sixteenth of the accounts is in seven of eight payments, as few customers of a bank make most of its payments. So what is written often is a small part of the
/// memory, and copying it while the program runs is of use.
const BUSY_SHARE: u64 = 16;
/// Accounts in one transaction of the filling.
const BATCH: u32 = 4096;

/// `MEMORY`: a transaction can be rolled back, and its journal is empty between two, which is where the program pauses and moves. `EXCLUSIVE`: there is no other connection.
/// The cache is small, so that the region is read, and faults, as a disk would be.
const SETTINGS: &str =
    "PRAGMA page_size = 4096; PRAGMA journal_mode = MEMORY; PRAGMA synchronous = OFF; PRAGMA temp_store = MEMORY;
    PRAGMA locking_mode = EXCLUSIVE; PRAGMA cache_size = 256";
const SCHEMA: &str = "CREATE TABLE accounts (id INTEGER PRIMARY KEY, balance INTEGER NOT NULL, profile BLOB NOT NULL);
    CREATE TABLE ledger (id INTEGER PRIMARY KEY, payer INTEGER NOT NULL, payee INTEGER NOT NULL, amount INTEGER NOT NULL)";

/// The bank cannot go on.
#[derive(Debug, Error)]
pub enum BankError {
    #[error("SQLite: {0}")]
    Sql(#[from] rusqlite::Error),
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// One payment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    pub payer: i64,
    pub payee: i64,
    pub amount: i64,
}

impl Transfer {
    /// What transfer `number` is at a bank with this many accounts, two or more.
    pub fn number(number: i64, accounts: u32) -> Transfer {
        let seed = mix(number.unsigned_abs());
        let busy = (u64::from(accounts) / BUSY_SHARE).max(2);
        let among = if seed & 7 == 0 { u64::from(accounts) } else { busy };
        let account = |random: u64| i64::try_from(random % among).unwrap_or(0);
        let payer = account(mix(seed ^ 1));
        let payee = account(mix(seed ^ 2));
        let payee = if payee == payer { account(payer.unsigned_abs() + 1) } else { payee };
        Transfer { payer: payer + 1, payee: payee + 1, amount: i64::try_from(seed >> 3 & 127).unwrap_or(0) + 1 }
    }
}

/// What an account has beside its balance: it follows from the account's number, and never changes.
pub fn profile(account: i64) -> Vec<u8> {
    let first = account.unsigned_abs() << 8;
    let mut bytes: Vec<u8> = (first..).take(PROFILE_BYTES.div_ceil(8)).flat_map(|word| mix(word).to_le_bytes()).collect();
    bytes.truncate(PROFILE_BYTES);
    bytes
}

/// The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// A connection to the bank in a region.
pub struct Bank {
    disk: Arc<Disk>,
    connection: Connection,
    accounts: u32,
}

impl Bank {
    /// Fills an empty region with a bank of `accounts`.
    ///
    /// # Errors
    /// [`BankError`], a region that is too small included.
    pub fn found(region: &Region, accounts: u32) -> Result<Bank, BankError> {
        Disk::format(region)?;
        let bank = Bank::connect(region)?;
        bank.explain(bank.fill(accounts))?;
        Ok(Bank { accounts, ..bank })
    }

    /// Finds the bank that is in the region. Faults pages in, and so may block.
    ///
    /// # Errors
    /// [`BankError`].
    pub fn open(region: &Region) -> Result<Bank, BankError> {
        let bank = Bank::connect(region)?;
        let accounts = bank.number("SELECT max(id) FROM accounts")?;
        Ok(Bank { accounts: u32::try_from(accounts).unwrap_or(u32::MAX), ..bank })
    }

    fn connect(region: &Region) -> Result<Bank, BankError> {
        let disk = Arc::new(Disk::insert(region)?);
        let bank = Bank { connection: vfs::connect(&disk)?, disk, accounts: 0 };
        bank.explain(bank.connection.execute_batch(SETTINGS))?;
        Ok(bank)
    }

    fn fill(&self, accounts: u32) -> rusqlite::Result<()> {
        self.connection.execute_batch(SCHEMA)?;
        let mut insert = self.connection.prepare("INSERT INTO accounts VALUES (?1, ?2, ?3)")?;
        for first in (0..accounts).step_by(BATCH as usize) {
            self.connection.execute_batch("BEGIN")?;
            for account in first..accounts.min(first + BATCH) {
                let account = i64::from(account) + 1;
                insert.execute((account, FIRST_BALANCE, profile(account)))?;
            }
            self.connection.execute_batch("COMMIT")?;
        }
        Ok(())
    }

    pub fn accounts(&self) -> u32 {
        self.accounts
    }

    /// How long the database's file is.
    ///
    /// # Errors
    /// [`BankError`].
    pub fn len_bytes(&self) -> Result<u64, BankError> {
        Ok(self.disk.len_bytes()?)
    }

    /// For `proof`: questions beside the clerk's.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// The one number that a query gives.
    ///
    /// # Errors
    /// [`BankError`].
    pub fn number(&self, query: &str) -> Result<i64, BankError> {
        self.explain(self.connection.query_row(query, [], |row| row.get(0)))
    }

    /// Somebody who makes transfers, from the first that the ledger does not have.
    ///
    /// # Errors
    /// [`BankError`].
    pub fn clerk(&self) -> Result<Clerk<'_>, BankError> {
        let next = self.number("SELECT ifnull(max(id), 0) FROM ledger")? + 1;
        let prepare = |sql| self.explain(self.connection.prepare(sql));
        Ok(Clerk {
            bank: self,
            next,
            begin: prepare("BEGIN")?,
            balance: prepare("SELECT balance FROM accounts WHERE id = ?1")?,
            set: prepare("UPDATE accounts SET balance = ?2 WHERE id = ?1")?,
            enter: prepare("INSERT INTO ledger VALUES (?1, ?2, ?3, ?4)")?,
            commit: prepare("COMMIT")?,
        })
    }

    /// Ends the connection when the program has left: the file is taken out first, so that SQLite can write nothing on its way, into memory that may still be sent.
    pub fn leave(self) {
        self.disk.take_out();
    }

    /// SQLite has one word for everything that its file may meet; the disk knows better.
    fn explain<T>(&self, done: rusqlite::Result<T>) -> Result<T, BankError> {
        done.map_err(|error| self.disk.failure().map_or(BankError::Sql(error), BankError::Disk))
    }
}

/// See [`Bank::clerk`].
pub struct Clerk<'b> {
    bank: &'b Bank,
    next: i64,
    begin: Statement<'b>,
    balance: Statement<'b>,
    set: Statement<'b>,
    enter: Statement<'b>,
    commit: Statement<'b>,
}

impl Clerk<'_> {
    /// Makes the next transfer, in one transaction, and says which it was once it is committed.
    ///
    /// # Errors
    /// [`BankError`]; the transfer is not made then.
    pub fn transfer(&mut self) -> Result<i64, BankError> {
        let done = self.commit_next();
        self.bank.explain(done)
    }

    fn commit_next(&mut self) -> rusqlite::Result<i64> {
        let number = self.next;
        let Transfer { payer, payee, amount } = Transfer::number(number, self.bank.accounts);
        self.begin.execute([])?;
        for (account, change) in [(payer, -amount), (payee, amount)] {
            // Read, then written: a balance that was lost on the way makes all that follow wrong.
            let balance: i64 = self.balance.query_row([account], |row| row.get(0))?;
            self.set.execute((account, balance + change))?;
        }
        self.enter.execute((number, payer, payee, amount))?;
        self.commit.execute([])?;
        self.next += 1;
        Ok(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region() -> Region {
        Region::builder().size(1 << 20).open().unwrap()
    }

    #[test]
    fn transfers_are_between_two_accounts_that_exist() {
        for accounts in [2, 3, 40, 1000] {
            for number in 1..2000 {
                let Transfer { payer, payee, amount } = Transfer::number(number, accounts);
                assert!(payer != payee && amount > 0, "{number} of {accounts}");
                assert!([payer, payee].iter().all(|account| (1..=i64::from(accounts)).contains(account)), "{number} of {accounts}");
            }
        }
        let busy = (1..1000).filter(|number| Transfer::number(*number, 1600).payer <= 100).count();
        assert!((800..950).contains(&busy), "{busy}");
    }

    #[test]
    fn the_next_connection_goes_on_where_the_last_one_was() {
        let region = region();
        let bank = Bank::found(&region, 200).unwrap();
        let mut clerk = bank.clerk().unwrap();
        assert_eq!((1..=50).map(|_| clerk.transfer().unwrap()).collect::<Vec<_>>(), (1..=50).collect::<Vec<_>>());
        drop(clerk);
        bank.leave();
        let bank = Bank::open(&region).unwrap();
        assert_eq!(bank.accounts(), 200);
        assert_eq!(bank.clerk().unwrap().transfer().unwrap(), 51);
        assert_eq!(bank.number("SELECT sum(balance) FROM accounts").unwrap(), 200 * FIRST_BALANCE);
    }

    #[test]
    fn four_accounts_fit_a_page_and_a_bank_that_does_not_fit_says_so() {
        let region = region();
        let bank = Bank::found(&region, 400).unwrap();
        assert!(bank.len_bytes().unwrap() < 400 * ACCOUNT_BYTES + 4 * 4096, "{:?}", bank.len_bytes());
        bank.leave();
        let error = Bank::found(&region, 2000).err().unwrap();
        assert!(matches!(error, BankError::Disk(DiskError::Full { .. })), "{error}");
    }
}
