"""Loss spikes: rules that see them, a gate before the update, and a policy that rewinds past them. docs/spikes.md"""
