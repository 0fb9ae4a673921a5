//! The ledger stays exact and the shares stay fair, whatever the cameras send.
