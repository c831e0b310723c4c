"""The one way in for what somebody else wrote, and the one way in which it is shown."""
