//! Whether the books are right: every transfer once, every balance what the transfers make of it, not a byte of anything else changed.
//!
//! Role: examines a bank from outside its program. Neighbours: `host` runs it at the end, over a new connection; the parent compares with its own journal (`journal`). Invariants:
//! nothing is believed that the program counted itself: the books are made again from the numbers of the transfers.

use crate::bank::{Bank, BankError, FIRST_BALANCE, Transfer, profile};

/// What an examiner found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// `PRAGMA integrity_check`, "ok" or the first complaint.
    pub integrity: String,
    /// Rows of the ledger.
    pub entries: i64,
    /// Of them, those that are not what the transfer in their place must be: a gap, a repetition or a wrong sum.
    pub wrong_entries: i64,
    pub accounts: i64,
    /// Accounts whose balance is not what the transfers make of it.
    pub wrong_balances: i64,
    /// Accounts whose profile changed.
    pub wrong_profiles: i64,
    /// All balances together, and what they were when the bank opened.
    pub money: i64,
    pub first_money: i64,
}

impl Findings {
    /// Whether the books are right by themselves.
    pub fn are_sound(&self) -> bool {
        let wrong = self.wrong_entries + self.wrong_balances + self.wrong_profiles;
        self.integrity == "ok" && wrong == 0 && self.money == self.first_money && self.accounts > 0
    }
}

/// Reads all of the database.
///
/// # Errors
/// [`BankError`] if it cannot be read; books that are wrong are a finding.
pub fn examine(bank: &Bank) -> Result<Findings, BankError> {
    let integrity = bank.connection().query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
    let mut balances = vec![FIRST_BALANCE; bank.accounts() as usize];
    let mut found = Findings { integrity, first_money: balances.iter().sum(), ..Findings::default() };

    let mut ledger = bank.connection().prepare("SELECT id, payer, payee, amount FROM ledger ORDER BY id")?;
    let mut rows = ledger.query([])?;
    while let Some(row) = rows.next()? {
        found.entries += 1;
        let entered = Transfer { payer: row.get(1)?, payee: row.get(2)?, amount: row.get(3)? };
        let due = Transfer::number(found.entries, bank.accounts());
        if row.get::<_, i64>(0)? != found.entries || entered != due {
            found.wrong_entries += 1;
        }
        for (account, change) in [(due.payer, -due.amount), (due.payee, due.amount)] {
            if let Some(balance) = usize::try_from(account - 1).ok().and_then(|at| balances.get_mut(at)) {
                *balance += change;
            }
        }
    }

    let mut accounts = bank.connection().prepare("SELECT id, balance, profile FROM accounts ORDER BY id")?;
    let mut rows = accounts.query([])?;
    let mut due = (1..).zip(balances);
    while let Some(row) = rows.next()? {
        let (account, balance): (i64, i64) = (row.get(0)?, row.get(1)?);
        found.accounts += 1;
        found.money += balance;
        if due.next() != Some((account, balance)) {
            found.wrong_balances += 1;
        }
        if row.get::<_, Vec<u8>>(2)? != profile(account) {
            found.wrong_profiles += 1;
        }
    }
    // Accounts that are not there any more.
    found.wrong_balances += i64::try_from(due.count()).unwrap_or(i64::MAX);
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry::Region;

    /// A bank after 30 transfers and what `sql` did to it.
    fn after(sql: &str) -> Findings {
        let region = Region::builder().size(1 << 20).open().unwrap();
        let bank = Bank::found(&region, 100).unwrap();
        let mut clerk = bank.clerk().unwrap();
        assert!((1..=30).all(|number| clerk.transfer().unwrap() == number));
        bank.connection().execute_batch(sql).unwrap();
        examine(&bank).unwrap()
    }

    #[test]
    fn right_books_are_found_right_and_each_wrong_one_wrong() {
        let right = after("");
        assert!(right.are_sound() && right.entries == 30 && right.accounts == 100, "{right:?}");
        for sql in [
            "UPDATE accounts SET balance = balance + 1 WHERE id = 99",
            "UPDATE accounts SET balance = balance + id - 98 WHERE id IN (97, 99)",
            "UPDATE accounts SET profile = zeroblob(950) WHERE id = 99",
            "DELETE FROM accounts WHERE id = 100",
            "DELETE FROM ledger WHERE id = 7",
            "UPDATE ledger SET amount = amount + 1 WHERE id = 7",
            "INSERT INTO ledger SELECT 31, payer, payee, amount FROM ledger WHERE id = 30",
        ] {
            let wrong = after(sql);
            assert!(!wrong.are_sound(), "{sql}: {wrong:?}");
        }
    }

    #[test]
    fn the_last_transfer_undone_is_left_for_the_journal_to_tell() {
        let undone = "UPDATE accounts SET balance = balance + (SELECT amount FROM ledger WHERE id = 30) WHERE id = (SELECT payer FROM ledger WHERE id = 30);
            UPDATE accounts SET balance = balance - (SELECT amount FROM ledger WHERE id = 30) WHERE id = (SELECT payee FROM ledger WHERE id = 30);
            DELETE FROM ledger WHERE id = 30";
        let found = after(undone);
        assert!(found.are_sound() && found.entries == 29, "{found:?}");
    }
}
