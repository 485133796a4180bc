//! Streaming conversion of a checkpoint by a plan.
