//! Files in folders that strangers may reach, and the page cache behind them.

pub(crate) mod destination;
pub(crate) mod directory;
pub(crate) mod page_cache;
